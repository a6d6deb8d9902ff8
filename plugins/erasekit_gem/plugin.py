"""Registers GEM."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register GEM."""
    register(
        "gem",
        "erasekit_gem.method:Gem",
        summary="a LoRA pulled to the neutral prompt and pushed off the concept in the first steps",
        paper="arXiv:2606.00140",
    )
