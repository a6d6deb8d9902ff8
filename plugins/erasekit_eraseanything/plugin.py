"""Registers EraseAnything."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register EraseAnything."""
    register(
        "eraseanything",
        "erasekit_eraseanything.method:EraseAnything",
        summary="bi-level LoRA with attention regulariser and contrastive term",
        paper="arXiv:2412.20413",
    )
