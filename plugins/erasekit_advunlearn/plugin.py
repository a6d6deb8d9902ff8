"""Registers AdvUnlearn."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register AdvUnlearn."""
    register(
        "advunlearn",
        "erasekit_advunlearn.method:AdvUnlearn",
        summary="fine-tuning against negated guidance under prefixes that an attack finds at each step",
        paper="arXiv:2405.15234",
    )
