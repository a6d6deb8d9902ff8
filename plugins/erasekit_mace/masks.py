"""Where in its images a concept is: components of the slot `masks`.

Each is called with (ctx, concept, x0, cond, positions, config): finished latents of the base, their prompts, where the
concept's phrase stands in those, (n, length), and the method's settings. It gives (n, 1, side, side) in [0, 1].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from erasekit.backbones.attention import attention_maps
from erasekit.backbones.protocol import Conditioning
from erasekit.concepts import Concept
from erasekit.methods.context import RunContext
from erasekit.methods.images import noised

TAUS = (0.4, 0.6, 0.8)  # where an image has taken shape and its prompt still matters
THRESHOLD = 0.4  # of the way from the least to the most attended place


def whole(
    ctx: RunContext, concept: Concept, x0: torch.Tensor, cond: Conditioning, positions: torch.Tensor, config: Any
) -> torch.Tensor:
    """Everywhere."""
    return torch.ones(len(x0), 1, 1, 1, device=x0.device)


@torch.no_grad()
def attention(
    ctx: RunContext, concept: Concept, x0: torch.Tensor, cond: Conditioning, positions: torch.Tensor, config: Any
) -> torch.Tensor:
    """Where the base's attention to the concept is more than `THRESHOLD`; everywhere for a style, as in the paper.

    Attention to the last token of each phrase (its noun; in CLIP it sums up the phrase), averaged over heads, layers
    and three points on the way to the image.
    """
    if concept.kind == "style":
        return whole(ctx, concept, x0, cond, positions, config)
    noun_NT, generator = positions & ~F.pad(positions[:, 1:], (0, 1)), ctx.generator(f"mace/masks/{concept.name}")
    heat = []
    with attention_maps(ctx.backbone.denoiser) as maps:
        for chunk in torch.arange(len(x0)).split(1):  # an image's maps are larger than all else that it takes
            layers = []
            for tau in TAUS:
                at = torch.full((len(chunk),), tau)
                ctx.predict(noised(ctx, x0[chunk], at, generator), at, cond[chunk])
                layers += [_image(map_BHIT, noun_NT[chunk]) for map_BHIT in maps.values()]
            side = max(layer.shape[-1] for layer in layers)
            heat.append(torch.stack([F.interpolate(layer, (side, side), mode="bilinear") for layer in layers]).mean(0))
    mean = torch.cat(heat)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    return ((mean - low) >= THRESHOLD * (high - low)).float()


def _image(map_BHIT: torch.Tensor, token_BT: torch.Tensor) -> torch.Tensor:
    """A layer's attention to some tokens as an image (b, 1, side, side) of mean 1."""
    heat_BI = (map_BHIT.mean(1) * token_BT[:, None]).sum(-1)
    heat_BI = heat_BI / heat_BI.mean(1, keepdim=True).clamp_min(1e-12)
    side = math.isqrt(heat_BI.shape[1])
    return heat_BI.view(-1, 1, side, side)
