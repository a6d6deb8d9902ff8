"""Registers STEREO."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, RegisterComponent, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register STEREO."""
    register(
        "stereo",
        "erasekit_stereo.method:Stereo",
        summary="learns words that bring the concept back, and erases all of them at once",
        paper="arXiv:2408.16807",
    )


@hookimpl
def register_components(register: RegisterComponent) -> None:
    """Register the stages for other methods."""
    register(
        "robustify",
        "words",
        "erasekit_stereo.harden:Words",
        summary="words are learned that bring the concept back, and edited in closed form",
        paper="arXiv:2408.16807",
    )
    register(
        "robustify",
        "blind",
        "erasekit_stereo.blind:Blind",
        summary="the denoiser is trained neither to begin nor to finish the concept, whatever the words",
        version=2,
    )
