"""Registers the negative prompt."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, RegisterComponent, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register the method."""
    register(
        "negative-prompt",
        "erasekit_negative_prompt.method:NegativePrompt",
        summary="guidance away from the concept while sampling; no weight changes",
        paper="arXiv:2207.12598",
    )


@hookimpl
def register_components(register: RegisterComponent) -> None:
    """Register its scheme of guidance."""
    register(
        "guidance",
        "negative-prompt",
        "erasekit_negative_prompt.method:Scheme",
        summary="the concept in the place of the empty prompt",
        paper="arXiv:2207.12598",
    )
