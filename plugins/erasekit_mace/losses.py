"""MACE's training loss, and where on the way to an image it is taken."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import functional as F

_SLOPE = 50.0  # the paper's 0.05 per timestep of 1000


def suppression(
    maps: Iterable[torch.Tensor], tokens_BT: torch.Tensor, mask_B1SS: torch.Tensor, *, total: bool = False
) -> torch.Tensor:
    """Attention to the concept's tokens inside of the mask: sum over tokens and layers of |A ⊙ M|^2 (section 4.2).

    As a mean over batch, heads, image tokens and layers, so that a layer's resolution does not weigh; as the paper's `total`
    a mean over the batch alone.

    Args:
        maps: (batch, heads, image tokens, text tokens) of each layer.
        tokens_BT: which text tokens are the concept's.
        mask_B1SS: where it is, brought to each layer's resolution.
        total: sum over layers, heads and image tokens.
    """
    layers = []
    for map_BHIT in maps:
        side = math.isqrt(map_BHIT.shape[2])
        mask_B1I = F.adaptive_avg_pool2d(mask_B1SS, side).flatten(2)
        mass_BHI = (map_BHIT.square() * tokens_BT[:, None, None]).sum(-1)
        seen_BHI = mass_BHI * mask_B1I.square()
        layers.append(seen_BHI.sum() / len(seen_BHI) if total else seen_BHI.mean())
    return torch.stack(layers).sum() if total else torch.stack(layers).mean()


def sample_tau(window: tuple[float, float], n: int, generator: torch.Generator) -> torch.Tensor:
    """`n` random points of the way, most of them inside of the window, whose edges are logistic (section 4.2).

    In the paper's timesteps the density is s(t - 200) - s(t - 400) with s(t) = sigmoid(0.05 t): the window (0.6, 0.8).
    """
    tau = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    density = torch.sigmoid(_SLOPE * (window[1] - tau)) - torch.sigmoid(_SLOPE * (window[0] - tau))
    return tau[torch.multinomial(density, n, replacement=True, generator=generator)]
