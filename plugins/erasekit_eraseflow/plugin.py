"""Registers EraseFlow."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register EraseFlow."""
    register(
        "eraseflow",
        "erasekit_eraseflow.method:EraseFlow",
        summary="a LoRA under which the concept's prompt makes the neutral prompt's random trajectories as likely",
        paper="arXiv:2511.00804",
    )
