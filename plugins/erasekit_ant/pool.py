"""The base model's guided trajectories under a concept's prompts, drawn once: the base does not change in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from erasekit.backbone import Conditioning, concatenate
from erasekit.method import RunContext

CHUNK = 8  # trajectories drawn in one batch


@dataclass(frozen=True)
class Pool:
    """Points of trajectories; all tensors have n rows.

    Attributes:
        x: latents.
        tau: progress.
        concept: the base's prediction f(c) there.
        empty: its prediction f(0) for the empty prompt.
        row: index into `cond`.
        cond: the prompts.
    """

    x: torch.Tensor
    tau: torch.Tensor
    concept: torch.Tensor
    empty: torch.Tensor
    row: torch.Tensor
    cond: Conditioning

    def at(self, index: torch.Tensor) -> Pool:
        """The points at an index or under a mask."""
        points = {name: getattr(self, name)[index] for name in ("x", "tau", "concept", "empty", "row")}
        return replace(self, **points)

    def sample(self, n: int, generator: torch.Generator) -> Pool:
        """`n` random points."""
        return self.at(torch.randint(len(self.x), (n,), generator=generator))


@torch.no_grad()
def draw(ctx: RunContext, cond: Conditioning, *, guidance: float, seeds: Sequence[int]) -> Pool:
    """One trajectory of the base under each prompt of `cond`, with all of its points.

    `guidance` is the scale of classifier-free guidance; a model with embedded guidance is told the protocol's.
    """
    backbone, size = ctx.backbone, ctx.protocol.size
    schedule, nothing = backbone.schedule(ctx.protocol.steps, size), backbone.encode([""])
    points: list[tuple[torch.Tensor, ...]] = []
    for chunk in torch.arange(len(seeds)).split(CHUNK):
        x = backbone.latents([seeds[i] for i in chunk], size)
        both = concatenate([nothing.repeat(len(x)), cond[chunk]])
        for k in range(len(schedule)):
            tau = schedule.tau[k].expand(len(x))
            empty, concept = ctx.predict(torch.cat([x, x]), torch.cat([tau, tau]), both).chunk(2)
            points.append((x, tau, concept, empty, chunk))
            direction = concept if backbone.embedded_guidance else empty + guidance * (concept - empty)
            x = backbone.step(direction, x, k, schedule)
    x, tau, concept, empty, row = (torch.cat(column) for column in zip(*points, strict=True))
    return Pool(x, tau, concept, empty, row, cond)
