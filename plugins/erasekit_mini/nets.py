"""The two small networks that judge images of the mini world: a multi-label classifier and a CLIP image tower."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from erasekit_mini import vocabulary as words


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """`inputs` -> `outputs` channels at 1/`stride` of the size."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, inputs, h, w) -> (b, outputs, h/stride, w/stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x) + self.norm2(self.conv2(h)))


class Trunk(nn.Module):
    """(b, 3, 64, 64) in [-1, 1] -> (b, 2 * widths[-1]): maximum and mean over the last 4 x 4 map."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        """Three stages of the given widths."""
        super().__init__()
        a, b, c = widths
        stem = nn.Sequential(nn.Conv2d(3, a, 5, 2, 2, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        self.stages = nn.Sequential(stem, Block(a, b, 2), Block(b, c, 2), Block(c, c, 2))
        self.features = 2 * c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features."""
        h = self.stages(x)
        return torch.cat([h.amax((2, 3)), h.mean((2, 3))], 1)


class MiniClassifier(nn.Module):
    """What a picture of the mini world shows. Its pooled features also carry the Frechet distance."""

    PRESENT = (*words.OBJECTS, "hazard", "face")

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 128)) -> None:
        """Heads: presence (12 independent), style (7, the first is none), identity (11, the last is nobody), background."""
        super().__init__()
        self.trunk = Trunk(widths)
        sizes = {
            "present": len(self.PRESENT),
            "style": 1 + len(words.STYLES),
            "identity": len(words.IDENTITIES) + 1,
            "background": len(words.BACKGROUNDS),
        }
        self.heads = nn.ModuleDict({name: nn.Linear(self.trunk.features, n) for name, n in sizes.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits per head for (b, 3, 64, 64) in [-1, 1], and the pooled `features` (b, 256)."""
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()} | {"features": features}


class MiniImageTower(nn.Module):
    """The image side of the mini CLIP."""

    def __init__(self, dim: int = 128, widths: tuple[int, int, int] = (24, 48, 96)) -> None:
        """Project the trunk to `dim`."""
        super().__init__()
        self.trunk = Trunk(widths)
        self.project = nn.Linear(self.trunk.features, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Unit vectors (b, dim) for (b, 3, 64, 64) in [-1, 1]."""
        return F.normalize(self.project(self.trunk(x)), dim=-1)
