"""What is trained of the denoiser. All of its other tensors are the base's own: there is one copy of the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from erasekit.backbones.protocol import Conditioning
from erasekit.erasures.deltas import Deltas, Dense
from erasekit.methods.context import RunContext
from erasekit.methods.exchange import Exchanged


class MaskedWeights:
    """The denoiser with `weight + mask * change` in some linear layers, which stand there only while it predicts.

    Attributes:
        change: {layer: what is trained, (out, in), float32, zero at first}.
        mask: {layer: which entries of it count}; layers that it leaves out count whole.
    """

    def __init__(self, ctx: RunContext) -> None:
        """Start with all linear layers, none of them changed."""
        self._exchanged = Exchanged(ctx)
        modules = ctx.backbone.denoiser.named_modules()
        self._base = {name: m.weight.detach() for name, m in modules if isinstance(m, nn.Linear)}
        self.change = {name: torch.zeros_like(w, dtype=torch.float32).requires_grad_() for name, w in self._base.items()}
        self.mask: Mapping[str, torch.Tensor] = {}

    def predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The prediction of the changed denoiser."""
        weights = {name: self._base[name].float() + self._own(name) for name in self.change}
        return self._exchanged.predict(weights, x, tau, cond)

    def deltas(self) -> Deltas:
        """What has been added to the weights by now, on the CPU."""
        return {name: Dense(self._own(name).detach().cpu().clone()) for name in self.change}

    def _own(self, name: str) -> torch.Tensor:
        return self.change[name] * self.mask[name] if name in self.mask else self.change[name]
