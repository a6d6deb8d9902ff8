"""The base's own trajectories, drawn once and reused: it does not change while a student trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from erasekit.backbones.protocol import Backbone, Conditioning, concatenate
from erasekit.backbones.sampler import follow
from erasekit.concepts import Concept
from erasekit.evaluation.tasks import Protocol
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import concept_pairs

# (x, tau, row) -> (what the sampler follows, predictions (b, k, ...) to keep)
Point = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Pool:
    """Points of trajectories with predictions there; all tensors have n rows and lie on the CPU.

    Attributes:
        x: latents.
        tau: progress, in double: half precision would shift timesteps.
        cond: the prompts, one row each; `row` says which one a point belongs to.
        row: index into `cond`.
        predictions: (n, k, ...), in the order they were asked for.
        device: where `sample` brings latents and predictions.
    """

    x: torch.Tensor
    tau: torch.Tensor
    cond: Conditioning
    row: torch.Tensor
    predictions: torch.Tensor
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        """The number of points."""
        return len(self.x)

    def at(self, index: torch.Tensor) -> Pool:
        """The points at an index or under a mask."""
        points = {name: getattr(self, name)[index] for name in ("x", "tau", "row", "predictions")}
        return replace(self, **points)

    def sample(self, n: int, generator: torch.Generator, weight: torch.Tensor | None = None) -> Pool:
        """`n` random points (drawn where `weight` is positive), on `device`, each with its own row of `cond`."""
        candidates = torch.arange(len(self)) if weight is None else (weight > 0).nonzero().flatten()
        drawn = self.at(candidates[torch.randint(len(candidates), (n,), generator=generator)])
        x, predictions = drawn.x.to(self.device), drawn.predictions.to(self.device)
        return replace(drawn, x=x, predictions=predictions, cond=self.cond[drawn.row], row=torch.arange(n))


def pool_of(
    backbone: Backbone, protocol: Protocol, cond: Conditioning, rows: torch.Tensor, seeds: Sequence[int], point: Point
) -> Pool:
    """All points of a trajectory per seed, under the protocol's steps; `point` says where each goes on.

    Args:
        backbone: whose denoiser draws.
        protocol: steps, size, and how many trajectories are drawn at once.
        cond: the pool's prompts.
        rows: which of them each seed belongs to, (seeds,).
        seeds: of the noise.
        point: called with latents, progress and rows of a batch.
    """
    points: list[tuple[torch.Tensor, ...]] = []

    def direction(x: torch.Tensor, tau: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        followed, predictions = point(x, tau, rows[drawn])
        points.append((x.cpu(), tau, rows[drawn], predictions.cpu()))
        return followed

    sampler: dict[str, Any] = {"steps": protocol.steps, "size": protocol.size, "batch": protocol.batch}
    follow(backbone, seeds, direction, **sampler, what="trajectories")
    x, tau, row, predictions = (torch.cat(column) for column in zip(*points, strict=True))
    return Pool(x, tau, cond, row, predictions, backbone.device)


@torch.no_grad()
def base_pool(
    backbone: Backbone,
    protocol: Protocol,
    cond: Conditioning,
    seeds: Sequence[int],
    others: Sequence[Conditioning] = (),
    *,
    told: float | None = None,
) -> Pool:
    """Guided trajectories under the prompts of `cond`, used in turn; `predictions` holds f(0), f(c) and those of `others`.

    Each of `others` has a prompt for each of `cond`. `told` is the scale that a model with embedded guidance is told for
    the predictions, while the trajectories keep the protocol's; left out, that too.
    """
    empty, asked = backbone.encode([""]), at_scale(protocol, told)

    def point(x: torch.Tensor, tau: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        conds = [empty.repeat(len(x)), *(each[row] for each in (cond, *others))]
        found = predict_each(backbone, asked, x, tau, conds)
        if backbone.embedded_guidance and told is not None:
            return backbone.predict(x, tau, cond[row], guidance=protocol.guidance), torch.stack(found, 1)
        return steer(backbone, protocol, found[0], found[1]), torch.stack(found, 1)

    return pool_of(backbone, protocol, cond, torch.arange(len(seeds)) % len(cond), seeds, point)


def predict_each(
    backbone: Backbone, protocol: Protocol, x: torch.Tensor, tau: torch.Tensor, conds: Sequence[Conditioning]
) -> tuple[torch.Tensor, ...]:
    """Predictions at the same points under several prompts, in one batch."""
    n = len(conds)
    together = backbone.predict(torch.cat([x] * n), torch.cat([tau] * n), concatenate(conds), guidance=protocol.guidance)
    return together.chunk(n)


def steer(backbone: Backbone, protocol: Protocol, none: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """What the sampler follows; a model with embedded guidance has guided its prediction already."""
    return prediction if backbone.embedded_guidance else none + protocol.guidance * (prediction - none)


def negative_guidance(anchor: torch.Tensor, concept: torch.Tensor, empty: torch.Tensor, eta: float) -> torch.Tensor:
    """A target that leads away from a concept: f(anchor) - eta (f(c) - f(0)), all of them (b, ...).

    ESD (arXiv:2303.07345) has the empty prompt as its anchor; its newer code has the concept, which with an eta of one
    more is the same. TRACE (section 4.2) and EraseAnything have the neutral prompt as anchor and in the place of the empty
    one: f(c_u) - eta (f(c) - f(c_u)).
    """
    return anchor - eta * (concept - empty)


def concept_pool(
    ctx: RunContext,
    concept: Concept,
    n: int,
    *,
    name: str,
    guidance: float | None = None,
    told: float | None = None,
    neutral: bool = False,
) -> Pool:
    """`n` trajectories of the base under random training prompts of a concept, guided at `guidance` or as the run is.

    `predictions` holds f(0), f(c) and, if `neutral`, those for the neutral prompts, `told` as in `base_pool`. `name` names
    the generator of prompts and seeds.
    """
    generator, pairs = ctx.generator(name), concept_pairs(concept, ctx.prompts("erase"))
    seeds = torch.randint(2**31, (n,), generator=generator).tolist()
    drawn = [pairs[row] for row in torch.randint(len(pairs), (n,), generator=generator).tolist()]
    cond, goal = (ctx.backbone.encode(list(side)) for side in zip(*drawn, strict=True))
    return base_pool(ctx.backbone, with_guidance(ctx, guidance), cond, seeds, [goal] if neutral else [], told=told)


def with_guidance(ctx: RunContext, guidance: float | None) -> Protocol:
    """The run's protocol at another scale of classifier-free guidance; what a model is told stays what sampling tells it."""
    return at_scale(ctx.protocol, None if ctx.backbone.embedded_guidance else guidance)


def at_scale(protocol: Protocol, guidance: float | None) -> Protocol:
    """The protocol at another scale of guidance, if one is given."""
    return protocol if guidance is None else protocol.model_copy(update={"guidance": guidance})
