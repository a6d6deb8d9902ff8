"""Registers SPEED."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register SPEED."""
    register(
        "speed",
        "erasekit_speed.method:Speed",
        summary="closed form in the null space of what must stay",
        paper="arXiv:2503.07392",
    )
