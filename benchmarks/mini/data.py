"""The rendered images as tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

WORK = Path(__file__).parent / "work"


class Images:
    """Images with labels and captions of one split, read from where `render.write_dataset` put them."""

    def __init__(self, split: str, folder: Path = WORK / "data") -> None:
        """Open the split lazily: the images stay on disk until a batch asks for them."""
        self.pixels = np.load(folder / f"{split}_images.npy", mmap_mode="r")
        labels = {
            k: torch.from_numpy(np.load(folder / f"{split}_{k}.npy")) for k in ("present", "style", "identity", "background")
        }
        self.labels = labels | {"present": labels["present"].float()}
        self.captions: list[str] = json.loads((folder / f"{split}_captions.json").read_text())

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.pixels)

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Images at `index` as (b, 3, 64, 64) float in [-1, 1], channels last."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.pixels[index.numpy()]))
        return to_tensor(pixels)


def to_tensor(pixels: torch.Tensor) -> torch.Tensor:
    """(b, h, w, 3) uint8 -> (b, 3, h, w) float in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
