"""The base model's guided trajectories with ESD's targets, drawn once: the base does not change while the student trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from erasekit.backbone import Conditioning, concatenate
from erasekit.method import RunContext
from erasekit_esd.guidance import negative_guidance

CHUNK = 8  # trajectories drawn in one batch


@dataclass(frozen=True)
class Pool:
    """Points of trajectories; all tensors have n rows.

    Attributes:
        x: latents.
        tau: progress.
        target: what the student has to predict there.
        row: index into `cond`.
        cond: the prompts.
    """

    x: torch.Tensor
    tau: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    cond: Conditioning

    def __len__(self) -> int:
        """The number of points."""
        return len(self.x)

    def sample(self, n: int, generator: torch.Generator) -> Pool:
        """`n` random points, each with a prompt of its own."""
        index = torch.randint(len(self), (n,), generator=generator)
        return Pool(self.x[index], self.tau[index], self.target[index], torch.arange(n), self.cond[self.row[index]])


@torch.no_grad()
def draw(
    ctx: RunContext,
    concept: Conditioning,
    anchor: Conditioning | None,
    *,
    eta: float,
    guidance: float,
    seeds: Sequence[int],
) -> Pool:
    """One trajectory of the base under each prompt of `concept`, with all of its points.

    `anchor` holds a prompt for each of `concept`, None stands for the empty one. `guidance` is the scale of
    classifier-free guidance; a model with embedded guidance is told the protocol's.
    """
    backbone, size = ctx.backbone, ctx.protocol.size
    schedule, empty = backbone.schedule(ctx.protocol.steps, size), backbone.encode([""])
    points: list[tuple[torch.Tensor, ...]] = []
    for chunk in torch.arange(len(seeds)).split(CHUNK):
        x, n = backbone.latents([seeds[i] for i in chunk], size), len(chunk)
        conds = [empty.repeat(n), concept[chunk], *([] if anchor is None else [anchor[chunk]])]
        together = concatenate(conds)
        for k in range(len(schedule)):
            tau = schedule.tau[k].expand(n)
            predicted = ctx.predict(torch.cat([x] * len(conds)), torch.cat([tau] * len(conds)), together).chunk(len(conds))
            none, full = predicted[:2]
            target = negative_guidance(none if anchor is None else predicted[2], full, none, eta)
            points.append((x, tau, target, chunk))
            x = backbone.step(full if backbone.embedded_guidance else none + guidance * (full - none), x, k, schedule)
    x, tau, target, row = (torch.cat(column) for column in zip(*points, strict=True))
    return Pool(x, tau, target, row, concept)
