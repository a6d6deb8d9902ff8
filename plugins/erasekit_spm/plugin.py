"""Registers SPM."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register SPM."""
    register(
        "spm",
        "erasekit_spm.method:Spm",
        summary="a rank-1 adapter on every block, held still under random encodings",
        paper="arXiv:2312.16145",
    )
