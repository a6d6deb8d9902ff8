"""Words that bring a concept back, learned against the denoiser as it stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from erasekit.attacks.losses import denoise_loss
from erasekit.attacks.tokens import on_cpu
from erasekit.attacks.words import Points, Word, begun, learn, points
from erasekit.backbones.protocol import Conditioning, concatenate
from erasekit.concepts import NEUTRAL, Concept
from erasekit.methods.context import RunContext


def learned(ctx: RunContext, concept: Concept, examples: torch.Tensor, *, name: str, steps: int, batch: int, lr: float) -> Word:
    """A word under which the denoiser explains images of the concept, x0 (n, ...); `name` names the generator."""
    backbone, generator = ctx.backbone, ctx.generator(name)
    word = begun(backbone, backbone.encoders, NEUTRAL[concept.kind], 1, generator)

    def loss(x0: torch.Tensor, cond: Conditioning, tau: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return denoise_loss(backbone, x0, cond, tau, noise, predict=ctx.predict)

    def draw(x0: torch.Tensor) -> Points:
        return points(backbone, ctx.protocol, x0, len(x0), generator)

    like = backbone.encode([""])
    learn(
        word, backbone, concept.templates, examples, loss, draw, like=like, steps=steps, lr=lr, batch=batch, generator=generator
    )
    return word


def read(ctx: RunContext, word: Word, templates: Sequence[str]) -> Conditioning:
    """Prompts with a learned word in each template."""
    like = ctx.backbone.encode([""])
    with torch.no_grad():
        return concatenate([on_cpu(word.read(ctx.backbone, template, like)) for template in templates])
