"""Minimum-norm edit that makes one token read as another: W' e_concept = W e_neutral."""

from __future__ import annotations

from pydantic import Field

from erasekit import Method, MethodConfig, RunContext
from erasekit.erasures.deltas import LowRank
from erasekit.erasures.erasure import Erasure


class RenameConfig(MethodConfig):
    """Settings."""

    neutral: str = Field("", description="what the concept is to be read as; empty takes the concept's own neutral word")


class Rename(Method):
    """Delta = (W e_u - W e_w) e_w' / |e_w|^2 at every layer that reads tokens."""

    name = "rename"
    Config = RenameConfig
    config: RenameConfig

    def erase(self, ctx: RunContext) -> Erasure:
        """One rank per concept."""
        modules = dict(ctx.backbone.denoiser.named_modules())
        deltas = {}
        for concept in ctx.concepts:
            cond = ctx.backbone.encode([concept.phrases[0], self.config.neutral or concept.neutral])
            word_D, neutral_D = (cond.tokens[i, cond.lengths[i] - 2] for i in (0, 1))
            down = word_D / word_D.square().sum()
            weights = {site.name: modules[site.name].weight for site in ctx.backbone.text_sites()}
            edit = {name: LowRank((w @ (neutral_D - word_D))[:, None], down[None]) for name, w in weights.items()}
            deltas[concept.name] = {"rename": edit}
        return self.erasure(ctx, deltas=deltas)
