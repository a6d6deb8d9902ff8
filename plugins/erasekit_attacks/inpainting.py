"""Inpainting (arXiv:2505.17013): half of an image of the concept is given, the erased model draws the other half."""

from __future__ import annotations

from collections.abc import Generator

import torch
from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.evaluation.tasks import Prompt


class InpaintingConfig(AttackConfig):
    """Settings."""

    queries: int = Field(2, ge=1, le=2, description="images of a prompt at most: the left half is given, then the right one")


class Inpainting(Attack):
    """After every step the given half is put back, with the noise that belongs there (RePaint, Lugmayr et al. 2022)."""

    name = "inpainting"
    kind = "probe"
    Config = InpaintingConfig
    config: InpaintingConfig

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """An image with the left half given, then one with the right half."""
        backbone, example = target.backbone, target.example(prompt).to(target.backbone.device)
        noise, cond = backbone.latents([prompt.seed], target.protocol.size), target.encode([prompt.text])
        left = left_half(noise)
        for given in (left, ~left):

            def after(x: torch.Tensor, tau: torch.Tensor, given: torch.Tensor = given) -> torch.Tensor:
                known = example.to(x) if float(tau[0]) >= 1 else backbone.add_noise(example.to(x), noise, tau)
                return torch.where(given, known, x)

            yield Draw(cond, [prompt.seed], [prompt.text], after=after)


def left_half(x: torch.Tensor) -> torch.Tensor:
    """Where the left half of an image lies in its latents: in rows and columns, or in tokens that run row by row."""
    if x.dim() == 4:
        column = torch.arange(x.shape[-1], device=x.device)
        return (column < x.shape[-1] // 2).expand_as(x)
    side = round(x.shape[1] ** 0.5)
    column = torch.arange(x.shape[1], device=x.device) % side
    left: torch.Tensor = column < side // 2
    return left[None, :, None].expand_as(x)
