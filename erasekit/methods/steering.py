"""Predictions of an erasure that changes no weights, outside of a pipeline: its scheme bends those of the base."""

from __future__ import annotations

import torch

from erasekit.backbones.protocol import Conditioning
from erasekit.erasures.guidance import Guidance, Step
from erasekit.methods.context import RunContext


class Steering:
    """What sampling under a guidance erasure is made of."""

    def __init__(self, ctx: RunContext, guidance: Guidance) -> None:
        """Of the context's backbone, at the scale of its protocol, or the erasure's own where the model's is embedded."""
        self._ctx, self._prompts = ctx, guidance.prompts
        self._scheme = ctx.component("guidance", guidance.scheme)(guidance.settings)
        self._scale = guidance.scale if ctx.backbone.embedded_guidance else ctx.protocol.guidance
        self._memory: dict[str, torch.Tensor] = {}
        self._last = 1.0

    def follow(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The guided prediction; the scheme's memory is emptied where progress falls back: there the next image begins."""
        if float(tau[0]) <= self._last:
            self._memory.clear()
        self._last = float(tau[0])
        empty, conditional = self._bent(x, tau, cond, self._memory)
        steered: torch.Tensor = empty + self._scale * (conditional - empty)
        return steered

    def conditional(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The scheme's conditional prediction at any points, as in the first step of an image; differentiable."""
        rows = [self._bent(x[[i]], tau[[i]], cond[[i]], {})[1] for i in range(len(x))]  # a scheme knows one progress at a time
        return torch.cat(rows)

    def _bent(
        self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning, memory: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        none, concept = (self._prompts[[row]].repeat(len(x)) for row in (0, 1))
        given = {"none": none, "wanted": cond, "concept": concept}

        def predict(*names: str) -> tuple[torch.Tensor, ...]:
            return tuple(self._ctx.predict(x, tau, given[name]) for name in names)

        found: tuple[torch.Tensor, torch.Tensor] = self._scheme(Step(predict, float(tau[0]), memory))
        return found
