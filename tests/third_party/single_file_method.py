"""A method in one file, for `--plugin single_file_method.py`: it deletes one direction from every text projection."""

from __future__ import annotations

from pydantic import Field

from erasekit import Method, MethodConfig, RunContext, hookimpl
from erasekit.erasures.deltas import LowRank
from erasekit.erasures.erasure import Erasure


class DirectionConfig(MethodConfig):
    """Settings."""

    strength: float = Field(1.0, ge=0, le=1, description="1 deletes the direction, 0 leaves it")


class Direction(Method):
    """W' = W - strength (W d) d', with d the unit vector from the neutral prompt's summary token to the concept's."""

    name = "direction"
    Config = DirectionConfig
    config: DirectionConfig

    def erase(self, ctx: RunContext) -> Erasure:
        """One direction per concept, at every site that reads tokens."""
        sites = [site.name for site in ctx.backbone.text_sites() if site.reads == "tokens"]
        deltas = {}
        for concept in ctx.concepts:
            phrase = concept.phrases[0]
            cond, neutral = ctx.backbone.encode([phrase]), ctx.backbone.encode([concept.neutralise(phrase)])
            d_D = cond.tokens[0, cond.lengths[0] - 1] - neutral.tokens[0, neutral.lengths[0] - 1]
            d_D = d_D.float() / d_D.float().norm()
            weights = {name: ctx.backbone.weight(name).cpu().float() for name in sites}
            edit = {name: LowRank(-self.config.strength * (w @ d_D)[:, None], d_D[None]) for name, w in weights.items()}
            deltas[concept.name] = {"direction": edit}
        return self.erasure(ctx, deltas=deltas)


@hookimpl
def register_methods(register):
    register("direction", Direction, summary="deletes one direction")
