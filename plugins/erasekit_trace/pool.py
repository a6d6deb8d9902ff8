"""The teacher's trajectories, drawn once and reused: four fifths of the time of a step would otherwise go into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from erasekit.backbone import Backbone, Conditioning, concatenate
from erasekit_trace.losses import negative_target

CHUNK = 32  # trajectories drawn in one batch


@dataclass(frozen=True)
class Pool:
    """Points of the teacher's trajectories with its predictions there; all tensors have n rows.

    Attributes:
        x: latents.
        tau: progress, on the CPU as `row` is.
        cond: the prompts, one row each; `row` says which one a point belongs to.
        row: index into `cond`.
        predictions: (n, k, ...) the teacher's predictions, in the order they were asked for.
    """

    x: torch.Tensor
    tau: torch.Tensor
    cond: Conditioning
    row: torch.Tensor
    predictions: torch.Tensor

    def __len__(self) -> int:
        """The number of points."""
        return len(self.x)

    def sample(self, n: int, generator: torch.Generator, weight: torch.Tensor | None = None) -> Pool:
        """`n` random points (drawn where `weight` is positive), each with its own row of `cond`."""
        candidates = torch.arange(len(self)) if weight is None else (weight > 0).nonzero().flatten().cpu()
        index = candidates[torch.randint(len(candidates), (n,), generator=generator)]
        cond = self.cond[self.row[index]]
        return Pool(self.x[index], self.tau[index], cond, torch.arange(n), self.predictions[index])


@dataclass(frozen=True)
class Recipe:
    """How trajectories are drawn: the sampler's steps, guidance, size in pixels, and where a semi-target trajectory turns."""

    steps: int
    guidance: float
    size: int
    tau0: float = 0.0
    eta_neg: float = 0.0


@torch.no_grad()
def clean_pool(backbone: Backbone, prompts: Conditioning, empty: Conditioning, recipe: Recipe, seeds: Sequence[int]) -> Pool:
    """Trajectories of the teacher under its own prompts; `predictions` holds f(c).

    The prompts are used in turn; one point in five is given the empty prompt instead, which guidance uses too.
    """
    cond = concatenate([prompts, empty])
    rows = torch.arange(len(seeds)) % len(prompts)

    def step(x: torch.Tensor, tau: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        none, full = _predict(backbone, recipe, x, tau, [empty.repeat(len(x)), cond[row]])
        return _steer(backbone, recipe, none, full), torch.stack([none, full], 1)

    pool = _draw(backbone, cond, rows, recipe, seeds, step)
    alone = torch.arange(len(pool)) % 5 == 0
    row = torch.where(alone, len(prompts), pool.row)
    none, full = pool.predictions.unbind(1)
    return Pool(pool.x, pool.tau, cond, row, torch.where(_like(alone, none), none, full)[:, None])


@torch.no_grad()
def target_pool(
    backbone: Backbone, concept: Conditioning, neutral: Conditioning, empty: Conditioning, recipe: Recipe, seeds: Sequence[int]
) -> Pool:
    """Semi-target trajectories (section 4.2): under c_w while tau < tau0, then under y*.

    `predictions` holds f(c_w), f(c_u), y*.
    """
    rows = torch.arange(len(seeds)) % len(concept)

    def step(x: torch.Tensor, tau: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        conds = [empty.repeat(len(x)), concept[row], neutral[row]]
        none, with_concept, without = _predict(backbone, recipe, x, tau, conds)
        target = negative_target(with_concept, without, recipe.eta_neg)
        direction = torch.where(_like(tau < recipe.tau0 - 1e-6, x), with_concept, target)
        return _steer(backbone, recipe, none, direction), torch.stack([with_concept, without, target], 1)

    return _draw(backbone, concept, rows, recipe, seeds, step)


@torch.no_grad()
def pair_pool(
    backbone: Backbone,
    pairs: Sequence[Conditioning],
    neutral: Conditioning,
    empty: Conditioning,
    recipe: Recipe,
    seeds: Sequence[int],
) -> Pool:
    """Trajectories of joint prompts under their neutral prompt; `pairs` = (both, first alone, second alone), row by row.

    `cond` holds the three kinds one after the other; `predictions` holds f(first), f(second), f(c_u).
    """
    both, first, second = pairs
    rows = torch.arange(len(seeds)) % len(both)

    def step(x: torch.Tensor, tau: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        conds = [empty.repeat(len(x)), first[row], second[row], neutral[row]]
        none, one, two, without = _predict(backbone, recipe, x, tau, conds)
        return _steer(backbone, recipe, none, without), torch.stack([one, two, without], 1)

    return _draw(backbone, concatenate([both, first, second]), rows, recipe, seeds, step)


def _draw(backbone: Backbone, cond: Conditioning, rows: torch.Tensor, recipe: Recipe, seeds: Sequence[int], step) -> Pool:  # type: ignore[no-untyped-def]
    schedule = backbone.schedule(recipe.steps, recipe.size)
    points: list[tuple[torch.Tensor, ...]] = []
    for chunk in torch.arange(len(seeds)).split(CHUNK):
        x = backbone.latents([seeds[i] for i in chunk], recipe.size)
        for k in range(len(schedule)):
            tau = schedule.tau[k].expand(len(x))  # in double: half precision would shift timesteps
            direction, predictions = step(x, tau, rows[chunk])
            points.append((x, tau, rows[chunk], predictions))
            x = backbone.step(direction, x, k, schedule)
    x, tau, row, predictions = (torch.cat(column) for column in zip(*points, strict=True))
    return Pool(x, tau, cond, row, predictions)


def _predict(
    backbone: Backbone, recipe: Recipe, x: torch.Tensor, tau: torch.Tensor, conds: Sequence[Conditioning]
) -> tuple[torch.Tensor, ...]:
    """The teacher's predictions under several prompts, in one batch."""
    n = len(conds)
    together = backbone.predict(torch.cat([x] * n), torch.cat([tau] * n), concatenate(conds), guidance=recipe.guidance)
    return together.chunk(n)


def _steer(backbone: Backbone, recipe: Recipe, none: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """What the sampler follows; a model with embedded guidance has guided its prediction already."""
    return prediction if backbone.embedded_guidance else none + recipe.guidance * (prediction - none)


def _like(mask_B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return mask_B.to(x.device).view(-1, *[1] * (x.dim() - 1))
