"""Registers ANT."""

from __future__ import annotations

from erasekit.registration.hookspecs import hookimpl


@hookimpl
def register_methods(register):  # type: ignore[no-untyped-def]
    """Register ANT."""
    register(
        "ant",
        "erasekit_ant.method:Ant",
        summary="early steps anchored, guidance reversed in the late ones",
        paper="ACM MM 2025",
    )
