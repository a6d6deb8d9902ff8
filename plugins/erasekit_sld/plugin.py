"""Registers Safe Latent Diffusion."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, RegisterComponent, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register the method."""
    register(
        "sld",
        "erasekit_sld.method:Sld",
        summary="safety guidance while sampling; no weight changes",
        paper="arXiv:2211.05105",
    )


@hookimpl
def register_components(register: RegisterComponent) -> None:
    """Register its scheme of guidance."""
    register(
        "guidance",
        "sld",
        "erasekit_sld.method:Scheme",
        summary="away from the concept where the prediction is near it",
        paper="arXiv:2211.05105",
    )
