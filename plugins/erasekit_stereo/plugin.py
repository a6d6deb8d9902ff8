"""Registers STEREO."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register STEREO."""
    register(
        "stereo",
        "erasekit_stereo.method:Stereo",
        summary="learns words that bring the concept back, and erases all of them at once",
        paper="arXiv:2408.16807",
    )
