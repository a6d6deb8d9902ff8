"""The embedded model: Stable Diffusion's classes, trained on the mini world, shipped beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from erasekit.builtin.sd import StableDiffusion


class Sd15Mini(StableDiffusion):
    """A 64 px Stable Diffusion of the mini world."""

    name: ClassVar[str] = "sd15-mini"
    domain: ClassVar[Literal["natural", "mini"]] = "mini"
    path: ClassVar[str] = str(Path(__file__).parent / "models" / "sd15-mini")
