"""Registers TRACE and the choices of its slots."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, RegisterComponent, hookimpl

SLOTS = {
    "refine": {
        "eq1": ("eq1", "the paper's Eq. 1, minimum norm"),
        "delta": ("delta", "projection of the difference, Prop. 3.2"),
        "whitened": ("whitened", "weighted by the covariance of what is kept, neutral held fixed"),
        "uce": ("uce", "UCE's ridge solution"),
        "none": ("no_refinement", "leave stage 1 out"),
    },
    "window": {
        "late": ("late", "tau >= tau0"),
        "full": ("full", "the whole trajectory"),
        "early": ("early", "tau < tau0"),
        "soft": ("soft", "a smooth rise around tau0"),
    },
    "bank": {
        "per-concept": ("per_concept", "a LoRA for each concept, one trained at a time"),
        "shared": ("shared", "one LoRA for all concepts"),
    },
}


@hookimpl
def register_methods(register: Register) -> None:
    """Register TRACE."""
    register(
        "trace",
        "erasekit_trace.method:Trace",
        summary="closed-form refinement, then late-window LoRAs",
        paper="arXiv:2505.23312",
    )


@hookimpl
def register_components(register: RegisterComponent) -> None:
    """Register the choices of TRACE's slots."""
    for slot, choices in SLOTS.items():
        for name, (attribute, summary) in choices.items():
            register(slot, name, f"erasekit_trace.slots:{attribute}", summary=summary)
    for name, summary in (
        ("probe", "a small classifier of x0 latents, trained on the teacher"),
        ("clip", "similarity of the decoded x0 to the concept's name"),
        ("lpips", "perceptual distance of the decoded x0 to the target's"),
    ):
        register("divergence", name, f"erasekit_trace.divergence:{name}", summary=summary)
