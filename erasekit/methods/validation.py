"""What an erasure leaves of its concepts, and how far it moves the rest, by predictions on validation prompts.

Images show whether a concept is gone, but cost a sampling run. Predictions along the base's own trajectories say the same
earlier: they choose settings (TRACE's eta), and every erasure is measured by them before it is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from erasekit.backbones.protocol import Conditioning, guided
from erasekit.erasures.deltas import merged
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.guidance import Guidance
from erasekit.erasures.remains import Remains, Residual
from erasekit.evaluation.tasks import Prompt
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import neutral_of
from erasekit.methods.steering import Steering
from erasekit.methods.trajectories import Pool, base_pool

PROMPTS = 24  # of all concepts together, by name and by other words each, and of preserved things
STEPS = 6  # points of a trajectory

# (x, tau, cond) -> the guided prediction that sampling would follow
Guided = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


def validation(ctx: RunContext) -> Validation:
    """The run's validation trajectories, drawn when they are first asked for: the denoiser has to be the base's then."""
    drawn: Validation = ctx.shared.get("validation") or Validation(ctx)
    ctx.shared["validation"] = drawn
    return drawn


def remains_of(ctx: RunContext, erasure: Erasure) -> Remains:
    """What an erasure leaves of its concepts, and its drift; the denoiser is the base's, and is again afterwards."""
    drawn = validation(ctx)
    if erasure.guidance is not None:
        return drawn.measure(erasure.guidance)
    with merged(ctx.backbone.denoiser, erasure.total()):
        return drawn.measure()


@dataclass
class Validation:
    """Validation prompts along the base's trajectories, drawn once for all that is measured on them.

    The concept's prompts are asked along trajectories of their neutral prompts, where an erased model finds itself: there the
    question is whether its prompt still pulls towards the concept. Where the concept has been drawn already, any model goes on
    drawing what it sees.

    Attributes:
        ctx: the run.
        asked: the prompts of `pool`, by name first, then in other words.
        pool: trajectories of their neutral prompts; `cond` holds the prompts, `predictions` f(0), f(c_u), f(c_w).
        kept: trajectories of preserved prompts; `predictions` holds f(0), f(q).
    """

    ctx: RunContext
    asked: Sequence[Prompt] = field(init=False)
    pool: Pool = field(init=False)
    kept: Pool | None = field(init=False)

    def __post_init__(self) -> None:
        """Draw the trajectories; the denoiser has to be the base's."""
        ctx, encode = self.ctx, self.ctx.backbone.encode
        protocol = ctx.protocol.model_copy(update={"steps": min(STEPS, ctx.protocol.steps)})
        self.asked = [*ctx.prompts("erase", "validation")[:PROMPTS], *ctx.prompts("synonyms", "validation")[:PROMPTS]]
        neutral, asked = (
            encode(texts) for texts in ([neutral_of(p, ctx.concepts) for p in self.asked], [p.text for p in self.asked])
        )
        self.pool = replace(base_pool(ctx.backbone, protocol, neutral, [p.seed for p in self.asked], [asked]), cond=asked)
        keep = ctx.prompts("preserve", "validation")[:PROMPTS]
        cond = encode([p.text for p in keep]) if keep else None
        self.kept = base_pool(ctx.backbone, protocol, cond, [p.seed for p in keep]) if cond is not None else None

    def measure(self, guidance: Guidance | None = None) -> Remains:
        """What the denoiser as it stands now (or `guidance` on it) leaves of each concept, and its drift."""
        scale = 1.0 if self.ctx.backbone.embedded_guidance else max(1.0, self.ctx.protocol.guidance)
        follow = self._plain if guidance is None else Steering(self.ctx, guidance).follow
        none, neutral, concept = self.pool.predictions.unbind(1)
        aim, direction = none + scale * (neutral - none), scale * (concept - neutral)
        left = self._along(self.pool, follow) - aim
        share_N = _per_prompt(self.pool, (left * direction)) / _per_prompt(self.pool, direction.square()).clamp_min(1e-12)
        share_N = share_N.clamp(0, 1)
        residual = {c.name: Residual(**self._shares(c.name, share_N)) for c in self.ctx.concepts}
        if self.kept is None:
            return Remains(residual=residual, drift=None)
        nothing, wanted = self.kept.predictions.unbind(1)
        moved = self._along(self.kept, follow) - (nothing + scale * (wanted - nothing))
        reach = (scale * (wanted - nothing)).double().square().mean()
        return Remains(residual=residual, drift=float((moved.double().square().mean() / reach).sqrt()))

    def _shares(self, name: str, share_N: torch.Tensor) -> dict[str, float | None]:
        """The mean over the prompts of one concept, by name and in other words."""
        shares: dict[str, float | None] = {}
        for key, which in (("prompts", "erase"), ("other_words", "synonyms")):
            rows = [i for i, p in enumerate(self.asked) if p.concept == name and p.set == which]
            shares[key] = float(share_N[rows].mean()) if rows else None
        return shares

    def _plain(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        empty, scale = self.ctx.backbone.encode([""]), self.ctx.protocol.guidance
        return guided(self.ctx.backbone, x, tau, cond, uncond=empty, scale=scale)

    @torch.no_grad()
    def _along(self, pool: Pool, follow: Guided) -> torch.Tensor:
        """Guided predictions at all points, one step of a batch of trajectories at a time, in the order they were drawn."""
        return torch.cat([follow(pool.x[at], pool.tau[at], pool.cond[pool.row[at]]) for at in _steps(pool.tau)])


def _steps(tau_M: torch.Tensor) -> Iterator[torch.Tensor]:
    """The indices of consecutive points with the same progress."""
    _, sizes = torch.unique_consecutive(tau_M, return_counts=True)
    yield from torch.arange(len(tau_M)).split(sizes.tolist())


def _per_prompt(pool: Pool, values: torch.Tensor) -> torch.Tensor:
    """Sums over the points of each prompt, (prompts,), float64 on the CPU."""
    sums_M = values.double().flatten(1).sum(1).cpu()
    return torch.zeros(len(pool.cond), dtype=torch.float64).index_add_(0, pool.row, sums_M)
