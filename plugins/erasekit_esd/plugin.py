"""Registers ESD."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register ESD."""
    register(
        "esd",
        "erasekit_esd.method:Esd",
        summary="fine-tuning against the model's own negated guidance",
        paper="arXiv:2303.07345",
    )
