"""Random encodings far from a prompt's, at which SPM holds the model still."""

from __future__ import annotations

from dataclasses import replace

import torch

from erasekit.backbones.protocol import Conditioning

NORMS = (0.8, 1.2)  # of an anchor, in units of the prompt's


def random_anchors(asked: Conditioning, generator: torch.Generator) -> Conditioning:
    """A random encoding for each of the prompts in `asked`; what a model reads pooled is drawn by itself."""
    pooled = None if asked.pooled is None else _drawn(asked.pooled, generator)
    return replace(asked, tokens=_drawn(asked.tokens, generator), pooled=pooled)


def random_like(target: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A Gaussian direction, taken with the probability 1 - cos to the target (at most 1), at .8 to 1.2 of its norm."""
    norm, (low, high) = target.norm(), NORMS
    while True:
        direction = torch.randn(target.shape, generator=generator)
        direction /= direction.norm()
        cosine = (direction * target).sum() / norm.clamp_min(1e-12)
        if torch.rand((), generator=generator) < 1 - cosine:
            found: torch.Tensor = direction * norm * (low + (high - low) * torch.rand((), generator=generator))
            return found


def _drawn(targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One for each row, as that lies in memory."""
    return torch.stack([random_like(row.float().cpu(), generator) for row in targets]).to(targets)
