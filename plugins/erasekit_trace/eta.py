"""The damping of stage 1, chosen on validation prompts (section 4.1)."""

from __future__ import annotations

import math

from erasekit.erasures.deltas import Deltas, merged, scale
from erasekit.erasures.remains import Remains
from erasekit.events import progress
from erasekit.methods.context import RunContext
from erasekit.methods.validation import validation

ETAS = (1.0, 0.85, 0.7, 0.5, 0.25, 0.0)


def choose_eta(ctx: RunContext, refined: Deltas) -> float:
    """The damping with the least cost on validation prompts, from 1 downwards until the cost rises."""
    drawn = validation(ctx)  # before the denoiser is edited
    best, least = ETAS[0], math.inf
    for i, eta in enumerate(ETAS):
        progress("damping", i, len(ETAS))
        with merged(ctx.backbone.denoiser, scale(refined, eta)):
            found = cost(drawn.measure(), ctx.protocol.guidance)
        if found >= least:
            break
        best, least = eta, found
    progress("damping", len(ETAS), len(ETAS))
    return best


def cost(remains: Remains, guidance: float) -> float:
    """(guidance x residual)^2 + drift^2: guidance multiplies what is left of a concept until it shows.

    Nothing is clamped, so that the cost tells two dampings apart however high the guidance scale is.
    """
    left = max((r.most for r in remains.residual.values()), default=0.0)
    return (max(1.0, guidance) * left) ** 2 + (remains.drift or 0.0) ** 2
