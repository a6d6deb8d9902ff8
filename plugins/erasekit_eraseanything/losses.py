"""The terms of EraseAnything's two levels as pure functions. Maps are (batch, heads, image tokens, text tokens)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def columns(maps: Sequence[torch.Tensor], tokens_BT: torch.Tensor, *, total: bool = False) -> torch.Tensor:
    """The attention regulariser: the size over heads of the attention to the concept's tokens, summed over those.

    As a mean over batch, layers and image tokens, or as the paper's `total` a sum over the latter.
    """
    sizes = [(map_BHIT.norm(dim=1) * tokens_BT[:, None]).sum(-1) for map_BHIT in maps]
    return torch.stack([(size_BI.sum(1) if total else size_BI).mean() for size_BI in sizes]).mean()


def feature(maps: Sequence[torch.Tensor], tokens_BT: torch.Tensor) -> torch.Tensor:
    """A word's attention feature (b, width) of length 1: where in the image its tokens are attended to, and by which heads.

    The mean attention to its tokens, less its mean over the image, so that the product of two features is their
    correlation and not how strong they are; layers count alike.
    """
    parts = []
    for map_BHIT in maps:
        heat_BHI = (map_BHIT * tokens_BT[:, None, None]).sum(-1) / tokens_BT.sum(1).clamp_min(1)[:, None, None]
        centred = (heat_BHI - heat_BHI.mean(2, keepdim=True)).flatten(1)
        parts.append(centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12))
    feature_BF: torch.Tensor = torch.cat(parts, 1) / len(parts) ** 0.5
    return feature_BF


def contrast(anchor_BF: torch.Tensor, towards_KBF: torch.Tensor, away_MBF: torch.Tensor, temperature: float) -> torch.Tensor:
    """Reverse contrastive term: -log of the share that `towards` has in sum exp(anchor . feature / temperature).

    The concept's feature is drawn to those of other words and off its own former one and its synonym's. Only the anchor
    has a gradient.
    """
    near, far = (torch.einsum("bf,kbf->kb", anchor_BF, other.detach()) / temperature for other in (towards_KBF, away_MBF))
    return (torch.cat([near, far]).logsumexp(0) - near.logsumexp(0)).mean()
