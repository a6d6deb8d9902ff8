"""One training step of TRACE's second stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from erasekit.backbones.protocol import Conditioning, concatenate
from erasekit.backbones.schedule import is_late, per_row
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.training import Losses
from erasekit.methods.trajectories import Pool
from erasekit_trace import losses
from erasekit_trace.config import TraceConfig
from erasekit_trace.slots import Adapter

ALONE = 4  # in one of so many rounds only the adapter in turn is active


class TraceStep:
    """The losses of one training step; concepts take turns, and only the adapter of the one in turn is trained.

    In rounds with an integration loss all adapters are active; in the others none but that one, which has to erase its concept
    and keep the rest by itself. If all were active always, two adapters whose concepts want different things of the same layers
    would pull against each other: their sum stands still while both grow from step to step.
    """

    def __init__(
        self,
        config: TraceConfig,
        ctx: RunContext,
        bank: AdapterBank,
        adapters: Sequence[Adapter],
        pools: Sequence[Pool],
        clean: Pool,
        pairs: Mapping[tuple[int, int], Pool],
        divergences: Sequence[Sequence[Any]],
    ) -> None:
        """Keep what a step draws from; `divergences` holds those of each concept."""
        self.config, self.bank, self.clean, self.pairs = config, bank, clean, pairs
        self.predict, self.to_x0 = ctx.predict, ctx.backbone.to_x0
        self.pools, self.divergences = pools, divergences
        self.owner = {i: adapter.name for adapter in adapters for i in adapter.concepts}
        window = ctx.component("window", config.window)(config)
        anchor = (lambda tau: torch.ones_like(tau)) if config.early_anchor else window
        self.weights = [anchor(pool.tau) for pool in pools]
        self.window = window

    def __call__(self, batch: int, generator: torch.Generator) -> Losses:
        """The named losses of batch number `batch`."""
        config = self.config
        step = batch // config.accumulate  # the parts of a step's batch belong to one concept
        turn, round_ = step % len(self.pools), step // len(self.pools)
        alone = round_ % ALONE == ALONE - 1
        self.bank.train_only(self.owner[turn], alone=alone)
        erase = self.pools[turn].sample(config.batch, generator, self.weights[turn])
        keep = self.clean.sample(config.batch, generator)
        cond = [erase.cond, keep.cond]
        prediction, kept = self._student([erase.x, keep.x], [erase.tau, keep.tau], cond)
        target, weight = erase.predictions[:, 2], self.window(erase.tau)
        if config.early_anchor:
            late = per_row(is_late(erase.tau, config.tau0), target)
            target, weight = torch.where(late, target, erase.predictions[:, 0]), torch.ones_like(weight)
        out = {
            "erase": losses.weighted_error(prediction, target, weight),
            "preserve": config.preserve
            * losses.weighted_error(kept, keep.predictions[:, 0], losses.preserve_weight(keep.tau, config.preserve_early)),
        }
        if self.divergences[turn] and round_ % config.divergence_every == 0:
            x0, goal = (self.to_x0(y, erase.x, erase.tau) for y in (prediction, target))
            for name, divergence in zip(config.divergence, self.divergences[turn], strict=True):
                out[name] = config.divergence_weight * divergence(x0, goal)
        if self.pairs and not alone and round_ % config.integration_every == 0:
            out["integration"] = config.integration_weight * self._integration(turn, generator)
        return out

    def student(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """A prediction with all adapters, for those who watch."""
        self.bank.train_only(self.bank.names[0])
        return self.predict(x, tau, cond)

    def _student(
        self, x: Sequence[torch.Tensor], tau: Sequence[torch.Tensor], cond: Sequence[Conditioning]
    ) -> tuple[torch.Tensor, ...]:
        """Predictions for several batches of equal size in one pass."""
        return self.predict(torch.cat(list(x)), torch.cat(list(tau)), concatenate(cond)).chunk(len(x))

    def _integration(self, turn: int, generator: torch.Generator) -> torch.Tensor:
        mine = [pair for pair in self.pairs if turn in pair]
        pool = self.pairs[mine[int(torch.randint(len(mine), (1,), generator=generator))]]
        n, third = max(2, self.config.batch // 2), len(pool.cond) // 3
        index = torch.randint(len(pool), (n,), generator=generator)
        x, tau, row = pool.x[index].to(pool.device), pool.tau[index], pool.row[index]
        one, two, neutral = pool.predictions[index].to(pool.device).unbind(1)
        both = self.predict(x, tau, pool.cond[row])
        with torch.no_grad():
            alone = self._student([x, x], [tau, tau], [pool.cond[row + third], pool.cond[row + 2 * third]])
        joint = torch.stack([losses.presence(both, c, neutral) for c in (one, two)])
        single = torch.stack([losses.presence(y, c, neutral) for y, c in zip(alone, (one, two), strict=True)])
        return losses.integration(joint, single)
