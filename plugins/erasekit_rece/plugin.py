"""Registers RECE, and its rounds as a stage for other methods."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, RegisterComponent, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register RECE."""
    register(
        "rece",
        "erasekit_rece.method:Rece",
        summary="UCE, then edits against embeddings that bring the concept back",
        paper="arXiv:2407.12383",
    )


@hookimpl
def register_components(register: RegisterComponent) -> None:
    """Register RECE's rounds."""
    register(
        "robustify",
        "rece",
        "erasekit_rece.method:robustify",
        summary="closed-form edits against closed-form adversarial embeddings",
        paper="arXiv:2407.12383",
    )
