"""Registers ANT."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register ANT."""
    register(
        "ant",
        "erasekit_ant.method:Ant",
        summary="early steps anchored, guidance reversed in the late ones",
        paper="ACM MM 2025",
    )
