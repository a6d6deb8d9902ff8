"""The sampling loop over a backbone, from noise to finished latents, whatever each step follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from erasekit.backbones.protocol import Backbone
from erasekit.events import progress

# (x, tau, rows) -> the prediction that a step follows; `rows` says which of the seeds the latents belong to
Direction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


After = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, tau) -> x, after a step; tau is 1 after the last


def follow(
    backbone: Backbone,
    seeds: Sequence[int],
    direction: Direction,
    *,
    steps: int,
    size: int | None,
    batch: int,
    what: str,
    begin: torch.Tensor | None = None,
    first: int = 0,
    after: After | None = None,
) -> torch.Tensor:
    """Draw latents as the pipeline does, one image per seed, along a direction of the caller's own.

    Args:
        backbone: whose noise, schedule and steps these are.
        seeds: of the noise.
        direction: called once per step of a batch with latents (b, ...), progress (b,) and rows (b,).
        steps: of the sampler.
        size: of the image in pixels.
        batch: how many are drawn at once.
        what: names the work to `events.progress`; "" tells nobody.
        begin: latents (n, ...) to begin with, in place of the noise of the seeds.
        first: the step that they are at.
        after: changes latents after every step.

    Returns:
        Finished latents x0 (n, ...).
    """
    schedule = backbone.schedule(steps, size)
    total, finished = len(seeds) * len(schedule), []
    for rows in torch.arange(len(seeds)).split(batch):
        x = backbone.latents([seeds[i] for i in rows], size) if begin is None else begin[rows]
        for k in range(first, len(schedule)):
            if what:
                progress(what, int(rows[0]) * len(schedule) + k * len(rows), total)
            x = backbone.step(direction(x, schedule.tau[k].expand(len(x)), rows), x, k, schedule)
            if after:
                x = after(x, (schedule.tau[k + 1] if k + 1 < len(schedule) else torch.ones(())).expand(len(x)))
        finished.append(x)
    if what:
        progress(what, total, total)
    return torch.cat(finished)
