"""How much memory and disk there is, and how much was used."""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from erasekit.errors import EnvironmentProblem

VRAM_GB = (8, 16, 24, 48, 80)


class Holding(NamedTuple):
    """How a model is held on a GPU of some size.

    Attributes:
        weights: of the denoiser: `whole`, `nf4` (4 bits, bitsandbytes) or `offload` (in RAM, brought layer by layer).
        encoders: the text encoders: `kept`, `released` before the denoiser is loaded, or on the `cpu`.
        checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    weights: Literal["whole", "nf4", "offload"] = "whole"
    encoders: Literal["kept", "released", "cpu"] = "kept"
    checkpointing: bool = False


def weights_gb(holding: Holding, denoiser: float, encoders: float, rest: float) -> float:
    """GB of weights on the GPU at once, given those of the model's parts in the type that they are held in."""
    held = {"whole": denoiser, "nf4": denoiser / 3.5, "offload": denoiser / 20}[holding.weights]
    together = {"kept": held + encoders, "released": max(held, encoders), "cpu": held}[holding.encoders]
    return together + rest


def vram_gb(setting: str, device: Any) -> int:
    """The size of GPU to plan for, one of `VRAM_GB`: as set, or the largest that this one is; on a CPU the largest."""
    if setting != "auto":
        return int(setting)
    if device.type != "cuda":
        return VRAM_GB[-1]
    import torch

    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    return max((gb for gb in VRAM_GB if gb <= total * 1.1), default=VRAM_GB[0])


def out_of_memory(error: BaseException, gb: int) -> EnvironmentProblem:
    """What to do when a GPU has run out of memory under a setting of `--vram`."""
    smaller = [size for size in VRAM_GB if size < gb]
    way_out = f"Try --vram {smaller[-1]}" if smaller else "Use a smaller batch or model"
    first = str(error).strip().splitlines()[0]
    return EnvironmentProblem(f"The GPU ran out of memory with --vram {gb} ({first}). {way_out}.")


def peak_memory_mb() -> float:
    """The most memory that this process has held: of the GPU if one was used, else of the machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def check_disk(folder: Path, *, pictures: int, size: int) -> None:
    """See that `pictures` PNGs of side `size` fit on the disk of `folder`, with 100 MB to spare for the erasure and the report.

    Raises:
        EnvironmentProblem: they do not.
    """
    need_mb = 100 + pictures * size * size * 3 / 1e6
    free_mb = shutil.disk_usage(folder).free / 1e6
    if free_mb < need_mb:
        numbers = f"The run needs about {need_mb:.0f} MB in '{folder}', which has {free_mb:.0f} MB free."
        raise EnvironmentProblem(f"{numbers} Free some or choose another folder with --out.")
