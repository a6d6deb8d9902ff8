"""The embedded models: the classes of Stable Diffusion and FLUX.1, trained on the mini world, shipped beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from erasekit.backbones.flux import Flux
from erasekit.backbones.memory import Holding
from erasekit.backbones.sd import StableDiffusion

MODELS = Path(__file__).parent / "models"
LICENCE = {"license": "apache-2.0"}


class Sd15Mini(StableDiffusion):
    """A 64 px Stable Diffusion of the mini world."""

    name: ClassVar[str] = "sd15-mini"
    domain: ClassVar[Literal["natural", "mini"]] = "mini"
    path: ClassVar[str] = str(MODELS / "sd15-mini")
    licence: ClassVar[Mapping[str, str]] = LICENCE


class FluxMini(Flux):
    """A 64 px FLUX of the mini world; guidance is distilled into it, as into FLUX.1-dev."""

    name: ClassVar[str] = "flux-mini"
    domain: ClassVar[Literal["natural", "mini"]] = "mini"
    path: ClassVar[str] = str(MODELS / "flux-mini")
    licence: ClassVar[Mapping[str, str]] = LICENCE
    sampling: ClassVar[Mapping[str, Any]] = {"sampler": "default"}
    cpu_dtype: ClassVar[torch.dtype] = torch.float32
    on_cpu: ClassVar[Holding] = Holding(rows=64)
    size: ClassVar[int] = 64
    size_step: ClassVar[int] = 8
    positions: ClassVar[int] = 24
    call: ClassVar[Mapping[str, Any]] = {"height": size, "width": size, "max_sequence_length": positions}
