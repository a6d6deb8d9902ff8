"""Registers Safe Latent Diffusion."""

from __future__ import annotations

from erasekit.registration.hookspecs import hookimpl


@hookimpl
def register_methods(register):  # type: ignore[no-untyped-def]
    """Register the method."""
    register(
        "sld",
        "erasekit_sld.method:Sld",
        summary="safety guidance while sampling; no weight changes",
        paper="arXiv:2211.05105",
    )


@hookimpl
def register_components(register):  # type: ignore[no-untyped-def]
    """Register its scheme of guidance."""
    register(
        "guidance",
        "sld",
        "erasekit_sld.method:Scheme",
        summary="away from the concept where the prediction is near it",
        paper="arXiv:2211.05105",
    )
