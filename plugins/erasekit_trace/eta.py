"""The damping of stage 1, chosen on validation prompts (section 4.1)."""

from __future__ import annotations

from erasekit.deltas import Deltas, merged, scale
from erasekit.method import RunContext
from erasekit.remains import Remains
from erasekit.validation import validation

ETAS = (1.0, 0.85, 0.7, 0.5, 0.25)


def choose_eta(ctx: RunContext, refined: Deltas) -> float:
    """The damping with the least cost on validation prompts."""
    drawn = validation(ctx)  # before the denoiser is edited
    found = {}
    for eta in ETAS:
        with merged(ctx.backbone.denoiser, scale(refined, eta)):
            found[eta] = drawn.measure()
    return min(ETAS, key=lambda eta: cost(found[eta], ctx.protocol.guidance))


def cost(remains: Remains, guidance: float) -> float:
    """(guidance x residual)^2 + drift^2: guidance multiplies what is left of a concept until it shows."""
    left = max((r.most for r in remains.residual.values()), default=0.0)
    return (max(1.0, guidance) * left) ** 2 + (remains.drift or 0.0) ** 2
