"""Registers what comes with erasekit."""

from __future__ import annotations

from erasekit.hookspecs import Register, hookimpl


@hookimpl
def register_backbones(register: Register) -> None:
    """Stable Diffusion 1.x."""
    sd = "erasekit.builtin.sd"
    register("sd15", f"{sd}:StableDiffusion", aliases=("sd1.5",), summary="Stable Diffusion 1.5, 860 M UNet, 512 x 512")
    register("sd14", f"{sd}:StableDiffusion14", aliases=("sd1.4",), summary="Stable Diffusion 1.4, the base of most papers")
