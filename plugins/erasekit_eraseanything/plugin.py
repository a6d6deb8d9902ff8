"""Registers EraseAnything."""

from __future__ import annotations

from erasekit.registration.hookspecs import hookimpl


@hookimpl
def register_methods(register):  # type: ignore[no-untyped-def]
    """Register EraseAnything."""
    register(
        "eraseanything",
        "erasekit_eraseanything.method:EraseAnything",
        summary="bi-level LoRA with attention regulariser and contrastive term",
        paper="arXiv:2412.20413",
    )
