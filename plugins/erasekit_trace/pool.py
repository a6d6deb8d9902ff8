"""What TRACE keeps of the teacher's trajectories: of clean prompts, semi-target ones, and of prompts with two concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from erasekit.backbones.protocol import Backbone, Conditioning, concatenate
from erasekit.backbones.schedule import is_late, per_row
from erasekit.evaluation.tasks import Protocol
from erasekit.methods.trajectories import Pool, base_pool, negative_guidance, pool_of, predict_each, steer


def clean_pool(backbone: Backbone, protocol: Protocol, prompts: Conditioning, seeds: Sequence[int]) -> Pool:
    """Trajectories of the teacher under its own prompts; `predictions` holds f(c).

    The prompts are used in turn; one point in five is given the empty prompt instead, which guidance uses too.
    """
    pool = base_pool(backbone, protocol, prompts, seeds)
    alone = torch.arange(len(pool)) % 5 == 0
    none, full = pool.predictions.unbind(1)
    return replace(
        pool,
        cond=concatenate([prompts, backbone.encode([""])]),
        row=torch.where(alone, len(prompts), pool.row),
        predictions=torch.where(per_row(alone, none), none, full)[:, None],
    )


@torch.no_grad()
def target_pool(
    backbone: Backbone,
    protocol: Protocol,
    concept: Conditioning,
    neutral: Conditioning,
    seeds: Sequence[int],
    *,
    tau0: float = 0.0,
    eta_neg: float = 0.0,
) -> Pool:
    """Semi-target trajectories (section 4.2): under c_w while tau < tau0, then under y* = f(c_u) - eta_neg (f(c_w) - f(c_u)).

    `predictions` holds f(c_w), f(c_u), y*.
    """
    empty = backbone.encode([""])

    def point(x: torch.Tensor, tau: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        conds = [empty.repeat(len(x)), concept[row], neutral[row]]
        none, with_concept, without = predict_each(backbone, protocol, x, tau, conds)
        target = negative_guidance(without, with_concept, without, eta_neg)
        direction = torch.where(per_row(is_late(tau, tau0), x), target, with_concept)
        return steer(backbone, protocol, none, direction), torch.stack([with_concept, without, target], 1)

    return pool_of(backbone, protocol, concept, torch.arange(len(seeds)) % len(concept), seeds, point)


@torch.no_grad()
def pair_pool(
    backbone: Backbone, protocol: Protocol, pairs: Sequence[Conditioning], neutral: Conditioning, seeds: Sequence[int]
) -> Pool:
    """Trajectories of joint prompts under their neutral prompt; `pairs` = (both, first alone, second alone), row by row.

    `cond` holds the three kinds one after the other; `predictions` holds f(first), f(second), f(c_u).
    """
    both, first, second = pairs
    empty = backbone.encode([""])

    def point(x: torch.Tensor, tau: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        conds = [empty.repeat(len(x)), first[row], second[row], neutral[row]]
        none, one, two, without = predict_each(backbone, protocol, x, tau, conds)
        return steer(backbone, protocol, none, without), torch.stack([one, two, without], 1)

    rows = torch.arange(len(seeds)) % len(both)
    return pool_of(backbone, protocol, concatenate([both, first, second]), rows, seeds, point)
