"""Rounding: all linear layers in 16, 8 or 4 bits, as models are shipped and served. Does it bring the concept back?"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import nn

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.erasures.deltas import Deltas, to_dense
from erasekit.errors import UsageError
from erasekit.evaluation.tasks import Prompt

BLOCK = 64  # weights that share a scale in NF4


class RoundingConfig(AttackConfig):
    """Settings."""

    queries: int = Field(1, ge=1, description="images that are drawn and judged for a prompt at most; there is one")


class Rounding(Attack):
    """The erasure merged into the weights, and these rounded; nothing else of the model is."""

    kind = "probe"
    Config = RoundingConfig

    @staticmethod
    def round(weight: torch.Tensor) -> torch.Tensor:
        """A weight (out, in), rounded."""
        raise NotImplementedError

    @contextmanager
    def ready(self, target: Target) -> Iterator[None]:
        """Round the weights."""
        erasure = target.erasure
        deltas = erasure.total() if erasure is not None and erasure.kind == "weights" else {}
        target.bank.remove()
        with rounded(target.backbone.denoiser, deltas, self.round):
            yield

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """The prompt."""
        yield target.draw([prompt.text], [prompt.seed])


@contextmanager
def rounded(denoiser: nn.Module, deltas: Deltas, to: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """All linear layers with deltas merged and rounded; the exact bits come back at the end.

    Raises:
        UsageError: the weights are in four bits already.
    """
    layers = {name: m for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    if not all(layer.weight.is_floating_point() for layer in layers.values()):
        raise UsageError("The weights are held in four bits already: nothing is left to be rounded. Use a larger --vram.")
    originals = {}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                originals[name] = layer.weight.detach().to("cpu", copy=True)
                change = to_dense(deltas[name]).to(layer.weight.device, torch.float32) if name in deltas else 0
                layer.weight.copy_(to(layer.weight.float() + change))
        yield
    finally:
        with torch.no_grad():
            for name, original in originals.items():
                layers[name].weight.copy_(original)


def bf16(weight: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 numbers."""
    return weight.bfloat16().float()


def int8(weight: torch.Tensor) -> torch.Tensor:
    """255 even steps between the largest value of each row and its negative (LLM.int8, Dettmers et al. 2022, Eq. 2)."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of 16 quantiles of a normal distribution, times the largest value of 64 weights (QLoRA, arXiv:2305.14314)."""
    flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-12)
    levels = nf4_levels().to(weight)
    middle = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(flat / scale, middle)] * scale
    return nearest.flatten()[: weight.numel()].view_as(weight)


def nf4_levels() -> torch.Tensor:
    """The 16 levels: 8 quantiles above zero, 7 below and zero itself, scaled to [-1, 1] (arXiv:2305.14314, Eq. 4)."""
    offset = 0.9677083  # the mean of the outermost quantiles of 15 and of 16 equal parts
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([above, torch.zeros(1), below]).sort().values
    return levels / levels.max()


class Bf16(Rounding):
    """In bfloat16."""

    name = "bf16"

    @staticmethod
    def round(weight: torch.Tensor) -> torch.Tensor:
        """See `bf16`."""
        return bf16(weight)


class Int8(Rounding):
    """In eight bits."""

    name = "int8"

    @staticmethod
    def round(weight: torch.Tensor) -> torch.Tensor:
        """See `int8`."""
        return int8(weight)


class Nf4(Rounding):
    """In four bits."""

    name = "nf4"

    @staticmethod
    def round(weight: torch.Tensor) -> torch.Tensor:
        """See `nf4`."""
        return nf4(weight)
