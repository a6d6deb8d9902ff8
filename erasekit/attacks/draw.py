"""What attacks and the models that they are tried on say to each other: what is known, and what is to be drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from erasekit.backbones.protocol import Conditioning
from erasekit.backbones.sampler import After

# What an attacker has: nothing but words; the text encoders, which an erasure does not change; the erased model's weights
# too; and the unedited model's besides. Each has all before it. Everybody may have images of the concept.
Knows = Literal["nothing", "text encoder", "erased", "erased+base"]
Bend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (latents, progress, prediction) -> prediction
KNOWS: tuple[Knows, ...] = ("nothing", "text encoder", "erased", "erased+base")


@dataclass(frozen=True)
class Draw:
    """Images to draw in one batch.

    Attributes:
        cond: the encoded prompts, a row each.
        seeds: of the noise, one each.
        texts: what somebody would type for them, "" where nobody can; kept only if a user asks for it.
        x: latents to begin with, in place of the noise.
        first: the step of the schedule that `x` is at.
        bend: (latents, progress, what sampling would follow) -> what it follows instead; with gradients on.
        after: (latents, progress) -> latents, after every step.
        cost: how far the attack had gone by here, for attacks that count it (see `Attack.counts`).
    """

    cond: Conditioning
    seeds: Sequence[int]
    texts: Sequence[str] = ()
    x: torch.Tensor | None = None
    first: int = 0
    bend: Bend | None = None
    after: After | None = None
    cost: float | None = None
