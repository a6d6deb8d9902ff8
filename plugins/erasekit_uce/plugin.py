"""Registers UCE."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register UCE."""
    register(
        "uce",
        "erasekit_uce.method:Uce",
        summary="one closed-form edit of the layers that read text, others preserved",
        paper="arXiv:2308.14761",
    )
