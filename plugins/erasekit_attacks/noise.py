"""Noise in sampling (arXiv:2505.17013): a stochastic sampler takes the erased model along paths that it was not trained on."""

from __future__ import annotations

from collections.abc import Generator

import torch
from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Bend, Draw
from erasekit.attacks.target import Target
from erasekit.backbones.sampler import After
from erasekit.evaluation.tasks import Prompt


class NoiseConfig(AttackConfig):
    """Settings."""

    queries: int = Field(8, ge=1, description="images of a prompt at most, with more and more noise")
    most: float = Field(1.0, ge=0, le=1, description="share of the noise that is fresh after every step of the last image")


class Noise(Attack):
    """After every step a share of the noise in the latents is replaced by fresh noise, as in DDIM with eta above 0."""

    name = "noise"
    kind = "probe"
    Config = NoiseConfig
    config: NoiseConfig

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """One image after the other, with a rising share of fresh noise."""
        cond = target.encode([prompt.text])
        for i in range(self.config.queries):
            share, generator = self.config.most * (i + 1) / self.config.queries, target.generator_of(prompt)
            bend, after = _hooks(target, share, generator)
            yield Draw(cond, [prompt.seed], [prompt.text], bend=bend, after=after)


def _hooks(target: Target, share: float, generator: torch.Generator) -> tuple[Bend, After]:
    """What a draw does to every prediction, and after every step."""
    backbone, x0 = target.backbone, list[torch.Tensor]()

    def bend(x: torch.Tensor, tau: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        x0[:] = [backbone.to_x0(prediction, x, tau).detach()]
        return prediction

    def after(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        if float(tau[0]) >= 1:
            return x
        none, one = torch.zeros_like(x), torch.ones_like(x)
        rate = backbone.add_noise(none, one, tau)
        own = (x - backbone.add_noise(x0[0], none, tau)) / rate
        fresh = torch.randn(x.shape, generator=generator).to(x)
        return backbone.add_noise(x0[0], (1 - share**2) ** 0.5 * own + share * fresh, tau)

    return bend, after
