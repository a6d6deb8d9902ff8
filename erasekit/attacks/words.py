"""A word that a model never had: vectors for its text encoders under which it explains images (Gal et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from erasekit.attacks.tokens import Slots, TextEncoders, compose, read_soft, words
from erasekit.backbones.protocol import Backbone, Conditioning
from erasekit.evaluation.tasks import Protocol
from erasekit.events import progress

# (latents, conditioning, progress, noise) -> the model's error
Loss = Callable[[torch.Tensor, Conditioning, torch.Tensor, torch.Tensor], torch.Tensor]


class Points(NamedTuple):
    """Where a step looks: noise and progress, a row each."""

    noise: torch.Tensor
    tau: torch.Tensor


def points(backbone: Backbone, protocol: Protocol, latent: torch.Tensor, n: int, generator: torch.Generator) -> Points:
    """`n` random points: steps of the sampler's schedule, and noise like a latent (1, ...)."""
    schedule = backbone.schedule(protocol.steps, protocol.size)
    tau = schedule.tau[torch.randint(len(schedule), (n,), generator=generator)]
    noise = torch.randn((n, *latent.shape[1:]), generator=generator)
    return Points(noise.to(backbone.device, backbone.dtype), tau)


@dataclass(frozen=True)
class Word:
    """A learned word.

    Attributes:
        vectors: {text encoder: (k, width)}, what it reads for the word.
    """

    vectors: Mapping[str, torch.Tensor]

    def read(self, texts: TextEncoders, template: str, like: Conditioning) -> Conditioning:
        """A template with the word in place of its `{}`, encoded; what other encoders make of it is taken from `like`."""
        return read_soft(texts, [{name: self._slots(texts, name, template) for name in self.vectors}], [self.vectors], like)

    def _slots(self, texts: TextEncoders, name: str, template: str) -> Slots:
        before, _, after = template.partition("{}")
        return compose(texts, name, [before, len(self.vectors[name]), after.replace("{}", "")])


def begun(
    texts: TextEncoders, encoders: Sequence[str], like: str, vectors: int, generator: torch.Generator, *, spread: float = 0.1
) -> Word:
    """A word that begins near the mean of the tokens of a text, `spread` of their deviation away."""
    found = {}
    for name in encoders:
        start = texts.lexicon(name).vectors[words(texts, name, like)].float().mean(0, keepdim=True)
        noise = torch.randn((vectors, start.shape[1]), generator=generator).to(start)
        found[name] = (start + spread * start.std() * noise).requires_grad_()
    return Word(found)


def learn(
    word: Word,
    texts: TextEncoders,
    templates: Sequence[str],
    examples: torch.Tensor,
    loss: Loss,
    draw: Callable[[torch.Tensor], Points],
    *,
    like: Conditioning,
    steps: int,
    lr: float,
    batch: int,
    generator: torch.Generator,
) -> None:
    """Train a word, in place, on images as latents (n, ...): AdamW on the model's error under random templates.

    Args:
        word: see `begun`.
        texts: the text encoders.
        templates: texts with one `{}`.
        examples: what the word should come to mean.
        loss: the model's error.
        draw: the points of a step, for its latents.
        like: the empty prompt, encoded, for encoders that do not learn the word.
        steps: of the training.
        lr: the rate.
        batch: images in a step, under one template.
        generator: draws templates and images.
    """
    optimizer = torch.optim.AdamW(word.vectors.values(), lr)
    for step in range(steps):
        progress("word", step, steps)
        template = templates[int(torch.randint(len(templates), (1,), generator=generator))]
        latents = examples[torch.randint(len(examples), (batch,), generator=generator)]
        at = draw(latents)
        cond = word.read(texts, template, like).repeat(batch)
        optimizer.zero_grad()
        loss(latents, cond, at.tau, at.noise).backward()
        optimizer.step()
    progress("word", steps, steps)
