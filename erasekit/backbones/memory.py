"""How much memory and disk there is, how much a run is predicted to take, and how much was used."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from erasekit.errors import EnvironmentProblem

GIB = 2**30
STATUS = Path("/proc/self/status")
VRAM_GB = (8, 12, 16, 24, 32, 48, 80, 141)
CONTEXT_GB = (
    1.3  # of driver, libraries and the workspaces of convolutions, which fake tensors do not have (measured on an H200)
)
USABLE = 0.93  # of a GPU: the allocator cannot use the last of it
LORA_GB = 0.05  # a concept's LoRA with its gradient and its moments


class Holding(NamedTuple):
    """How a model is held on a GPU of some size.

    Attributes:
        rows: the most rows that are predicted at once without gradients, at the model's reference size.
        weights: of the denoiser: `whole`, `nf4` (4 bits, bitsandbytes) or `offload` (in RAM, brought layer by layer; such
            a model draws images, but nothing of it can be trained).
        encoders: the text encoders: `kept`, `released` before the denoiser is loaded, or on the `cpu`.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        slicing: decode one image at a time.
    """

    rows: int
    weights: Literal["whole", "nf4", "offload"] = "whole"
    encoders: Literal["kept", "released", "cpu"] = "kept"
    checkpointing: bool = False
    slicing: bool = False


class Activations(NamedTuple):
    """GiB that one row (latents with a prompt) takes beside the weights, at the peak of a pass.

    Attributes:
        forward: without gradients.
        kept: with gradients, all activations kept.
        checkpointed: with gradients, activations recomputed.
        maps: attention maps with their gradients, for methods that look at them, on top.
        decode: the VAE's decoding of an image.
    """

    forward: float
    kept: float
    checkpointed: float
    maps: float
    decode: float


class Needs(NamedTuple):
    """What a model takes: GiB of its parts' weights, TFLOP and activations of a row, and how it is held."""

    denoiser: float
    encoders: float
    vae: float
    tflop: float
    activations: Activations
    held: Holding


class Footprint(NamedTuple):
    """What a method's training step holds at once.

    Attributes:
        rows: rows of the denoiser whose activations are kept until the backward pass; 0 if nothing is trained.
        maps: whether attention maps are kept with them.
        trained_gb: GiB of what is trained, with gradients and moments.
    """

    rows: int = 0
    maps: bool = False
    trained_gb: float = 0.0


class Prediction(NamedTuple):
    """The predicted peaks of a run's stages in GiB; nobody has measured them."""

    encode: float
    train: float
    draw: float

    @property
    def peak(self) -> float:
        """The largest."""
        return max(self)


def weights_gb(holding: Holding, denoiser: float, encoders: float, rest: float) -> float:
    """GB of weights on the GPU at once, given those of the model's parts in the type that they are held in."""
    held = denoiser_gb(holding, denoiser)
    together = {"kept": held + encoders, "released": max(held, encoders), "cpu": held}[holding.encoders]
    return together + rest


def denoiser_gb(holding: Holding, whole: float) -> float:
    """GB of the denoiser's weights on the GPU at once."""
    return {"whole": whole, "nf4": whole / 3.5, "offload": whole / 20}[holding.weights]


def predict(needs: Needs, step: Footprint, *, images: int, passes: int) -> Prediction:
    """The peaks of encoding, of a training step, and of drawing `images` at once with `passes` rows each."""
    held, row = needs.held, needs.activations
    beside = needs.encoders if held.encoders == "kept" else 0.0
    base = denoiser_gb(held, needs.denoiser) + needs.vae + beside + CONTEXT_GB
    kept = (row.checkpointed if held.checkpointing else row.kept) + (row.maps if step.maps else 0.0)
    decoding = row.decode * (1 if held.slicing else images)
    encoding = 0.0 if held.encoders == "cpu" else needs.encoders + 0.5 + CONTEXT_GB
    return Prediction(
        encode=encoding,
        train=base + step.trained_gb + max(step.rows * kept, held.rows * row.forward) if step.rows else 0.0,
        draw=base + max(images * passes * row.forward, decoding),
    )


def budget_gb(gb: float) -> float:
    """How much of a GPU of `gb` GB a prediction may take."""
    return USABLE * gb


def vram_gb(setting: str, device: Any) -> int:
    """The size of GPU to plan for, one of `VRAM_GB`: as set, or the largest that this one is; on a CPU the largest."""
    if setting != "auto":
        return int(setting)
    if device.type != "cuda":
        return VRAM_GB[-1]
    import torch

    total = torch.cuda.get_device_properties(device).total_memory / GIB
    return max((gb for gb in VRAM_GB if gb <= total * 1.1), default=VRAM_GB[0])


def there_gb(device: Any) -> float:
    """The memory in GiB that the device has: of a GPU all of it, of the machine what is free."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(device).total_memory / GIB)
    lines = Path("/proc/meminfo")
    if lines.is_file():
        found = dict(line.split(":", 1) for line in lines.read_text().splitlines())
        return int(found["MemAvailable"].split()[0]) / 2**20
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB)


def out_of_memory(error: BaseException, gb: int) -> EnvironmentProblem:
    """What to do when a GPU has run out of memory under a setting of `--vram`."""
    smaller = [size for size in VRAM_GB if size < gb]
    way_out = f"Try --vram {smaller[-1]}" if smaller else "Use a smaller batch or model"
    first = str(error).strip().splitlines()[0]
    return EnvironmentProblem(f"The GPU ran out of memory with --vram {gb} ({first}). {way_out}.")


def reset_peak() -> None:
    """Begin to look for the peak anew, so that a process can tell it of each of several runs; where the system allows it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """The most memory held since `reset_peak`, or since the process began: of the GPU if one was used, else of the machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    return resident_mb()


def resident_mb() -> float:
    """The most of the machine's memory held since `reset_peak`, or since the process began."""
    if STATUS.is_file():
        high = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(high.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def check_disk(folder: Path, *, spare_mb: float = 100) -> None:
    """See that the disk of `folder` has room for an erasure.

    Raises:
        EnvironmentProblem: it has not.
    """
    there = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free_mb = shutil.disk_usage(there).free / 1e6
    if free_mb < spare_mb:
        numbers = f"An erasure needs about {spare_mb:.0f} MB in '{folder}', which has {free_mb:.0f} MB free."
        raise EnvironmentProblem(f"{numbers} Free some or choose another folder with --out.")
