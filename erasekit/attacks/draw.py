"""What attacks and the models that they are tried on say to each other: what is known, and what is to be drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from erasekit.backbones.protocol import Conditioning, concatenate
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

    @property
    def plain(self) -> bool:
        """Whether every image is drawn by itself: nothing that changes a step sees the batch."""
        return self.bend is None and self.after is None


def merged(draws: Sequence[Draw]) -> list[tuple[Draw, list[int]]]:
    """Draws put together as far as one batch can draw them, each with the places of those that it is made of."""
    alike: dict[object, list[int]] = {}
    for place, draw in enumerate(draws):
        alike.setdefault((draw.first, draw.x is None) if draw.plain else place, []).append(place)
    found = []
    for places in alike.values():
        own = [draws[place] for place in places]
        x = None if own[0].x is None else torch.cat([draw.x for draw in own if draw.x is not None])
        seeds = [seed for draw in own for seed in draw.seeds]
        whole = (
            own[0] if len(own) == 1 else replace(own[0], cond=concatenate([d.cond for d in own]), seeds=seeds, texts=(), x=x)
        )
        found.append((whole, places))
    return found
