"""How a diffusers pipeline is held in memory: what its classes know before anything is loaded."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from erasekit.backbones.folders import elements, first_line, part_config
from erasekit.backbones.memory import GIB, Activations, Holding, Needs, vram_gb, weights_gb
from erasekit.backbones.protocol import BackboneConfig
from erasekit.errors import EnvironmentProblem
from erasekit.quiet import quiet


class HeldPipeline:
    """The sizes of a pipeline's parts, and how they are held on a GPU of some size.

    Attributes:
        path: hub id or local folder that is loaded if the config names none.
        prefix: the denoiser's name in the pipeline.
        encoders: names of the pipeline's text encoders.
        holding: how it is held on a GPU of each size.
        on_cpu: how it is held on a CPU, unless a size is asked for.
        sizes_gb: of the denoiser, the text encoders and the VAE on the hub, at 16 bits.
        architecture: the name of the denoiser's class in diffusers, and its public configuration.
        size_step: what the side of an image is a multiple of.
        cpu_dtype: what `dtype = "auto"` means on a CPU.
        scopes: {name: pattern of the denoiser's linear layers}.
    """

    path: ClassVar[str]
    prefix: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    holding: ClassVar[Mapping[int, Holding]]
    on_cpu: ClassVar[Holding] = Holding(rows=4)
    sizes_gb: ClassVar[tuple[float, float, float]]
    architecture: ClassVar[tuple[str, Mapping[str, Any]]]
    size_step: ClassVar[int] = 8
    cpu_dtype: ClassVar[torch.dtype] = torch.float32
    scopes: ClassVar[Mapping[str, str]]

    @classmethod
    def dtype_of(cls, config: BackboneConfig, device: torch.device) -> torch.dtype:
        """The type that the weights are held in."""
        if config.dtype != "auto":
            return getattr(torch, config.dtype)  # type: ignore[no-any-return]
        return cls.cpu_dtype if device.type == "cpu" else torch.bfloat16

    @classmethod
    def held(cls, config: BackboneConfig) -> Holding:
        """How the model is held under these settings."""
        device = find_device(config.device)
        if config.vram == "auto" and device.type == "cpu":
            return cls.on_cpu
        return cls.holding[vram_gb(config.vram, device)]

    @classmethod
    def needs(cls, config: BackboneConfig, size: int) -> Needs:
        """What the model takes under these settings for images of `size` pixels; nothing is loaded for it."""
        folder, dtype = Path(config.path or cls.path).expanduser(), cls.dtype_of(config, find_device(config.device))
        named = (cls.prefix,), cls.encoders, ("vae",)
        found = [2 / GIB * sum(elements(folder / name) for name in names) for names in named]
        width = dtype.itemsize / 2
        denoiser, encoders, vae = (width * (gb or usual) for gb, usual in zip(found, cls.sizes_gb, strict=True))
        row = Activations(*(width * gb for gb in cls.activations(size)))
        return Needs(denoiser, encoders, vae, cls.tflop(size), row, cls.held(config))

    @classmethod
    def weights_gb(cls, config: BackboneConfig) -> float:
        """About how many GB of weights are held at once under these settings; nothing is loaded or downloaded for it."""
        needs = cls.needs(config, 0)
        return weights_gb(needs.held, needs.denoiser, needs.encoders, needs.vae)

    @classmethod
    def activations(cls, size: int) -> Activations:
        """What a row takes at 16 bits, for an image of `size` pixels."""
        raise NotImplementedError

    @classmethod
    def tflop(cls, size: int) -> float:
        """About how many TFLOP a forward pass of one row is."""
        raise NotImplementedError

    @classmethod
    def linears(cls, config: BackboneConfig, scope: str = "all") -> dict[str, int]:
        """The denoiser's linear layers of a scope and how many weights each has; nothing is loaded for it.

        All of them, if there is no such scope: a method may have names of its own for layers.
        """
        kind: Any = cls  # a class can be hashed, which mypy does not see
        found, pattern = _linears(kind, Path(config.path or cls.path).expanduser()), cls.scopes.get(scope, "")
        return {name: n for name, n in found.items() if re.search(pattern, name)}


@cache
def _linears(kind: type[HeldPipeline], folder: Path) -> dict[str, int]:
    name, values = kind.architecture
    if (folder / kind.prefix / "config.json").is_file():
        values = part_config(folder, kind.prefix)
    return {name: module.weight.numel() for name, module in skeleton(of_diffusers(name), values).items()}


def of_diffusers(name: str) -> Any:
    """A class of diffusers. Its import takes seconds, which nobody should wait for to be told of a wrong setting."""
    import diffusers

    return getattr(diffusers, name)


def skeleton(model_class: Any, config: Mapping[str, Any]) -> dict[str, nn.Linear]:
    """The linear layers of a model without its weights, in the order of the model."""
    with torch.device("meta"), quiet():
        model = model_class.from_config(config)
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def find_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one.

    Raises:
        EnvironmentProblem: this machine has no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        there = torch.empty(0, device=name).device
        if there.type == "meta":
            raise RuntimeError("it holds no values")
        return there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EnvironmentProblem(
            f"Device '{name}' cannot be used ({first_line(error)}); 'backbone.device' takes auto, cpu, cuda, cuda:1, mps."
        ) from error


def check_nf4(held: Holding, gb: int) -> None:
    """See that what four bits need is installed, if the weights are held in them.

    Raises:
        EnvironmentProblem: it is not.
    """
    if held.weights == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentProblem(f"--vram {gb} needs bitsandbytes: pip install 'erasekit[nf4]'.")
