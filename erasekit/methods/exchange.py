"""A denoiser with other weights for the length of a call: the student's stand in for the base's, and one model is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from erasekit.backbones.checkpointing import checkpointed
from erasekit.backbones.protocol import Conditioning
from erasekit.methods.context import RunContext


class Exchanged(nn.Module):
    """The context's `predict`, with weights of some linear layers exchanged."""

    def __init__(self, ctx: RunContext) -> None:
        """Of the context's denoiser, which is never written to."""
        super().__init__()
        self.denoiser, self._predict = ctx.backbone.denoiser, ctx.predict

    def forward(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The context's prediction, whatever tensors the denoiser holds."""
        return self._predict(x, tau, cond)

    def predict(
        self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, tau: torch.Tensor, cond: Conditioning
    ) -> torch.Tensor:
        """The prediction with `weights` {layer: (out, in), any float type} in place; differentiable in them."""
        own = dict(self.denoiser.named_parameters())
        exchanged = {f"{name}.weight": w.to(own[f"{name}.weight"].dtype) for name, w in weights.items()}
        paths = {block: f"{path}." for path, block in self.denoiser.named_modules()}

        def run(block: nn.Module, *inputs: Any) -> Any:
            path = paths[block]
            within = {name.removeprefix(path): w for name, w in exchanged.items() if name.startswith(path)}
            return checkpoint(partial(functional_call, block, within), inputs, use_reentrant=False)

        with checkpointed(self.denoiser, run):
            whole = {f"denoiser.{name}": w for name, w in exchanged.items()}
            prediction: torch.Tensor = functional_call(self, whole, (x, tau, cond))
        return prediction
