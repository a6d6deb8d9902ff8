"""Concept inversion (ICLR 2024, arXiv:2308.01508): a word that the model never had, trained on the erased model."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.attacks.tokens import encoders, on_cpu
from erasekit.attacks.words import Points, Word, begun, learn, points
from erasekit.concepts import NEUTRAL, whole_words
from erasekit.evaluation.tasks import Prompt

MINI = {"steps": 300, "lr": 2e-2, "together": 16}


class InversionConfig(AttackConfig):
    """Settings; the defaults are the published code's, but for its batch of 16."""

    queries: int = Field(
        1, ge=1, description="images that are drawn and judged for a prompt at most; each has noise of its own"
    )
    steps: int = Field(5000, ge=1, description="steps of the training (published: 5000)")
    lr: float = Field(5e-3, gt=0, description="rate of AdamW (published: 5e-3)")
    batch: int = Field(4, ge=1, description="images in a step (published: 4, accumulated 4 times)")
    vectors: int = Field(1, ge=1, description="vectors that the word is made of (published: 1)")
    encoders: tuple[str, ...] = Field((), description="text encoders that learn the word; none named: all")


class Inversion(Attack):
    """Textual inversion (Gal et al. 2022) on the erased model, with images of the concept; then its word in every prompt.

    No prompt can be typed for it: the vector has to be loaded, as embeddings that people share are.
    """

    name = "concept-inversion"
    knows = "erased"
    Config = InversionConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd15-mini": MINI, "flux-mini": MINI}
    config: InversionConfig

    def __init__(self, config: Any) -> None:
        """Nothing is learned yet."""
        super().__init__(config)
        self._word = Word({})

    @contextmanager
    def ready(self, target: Target) -> Iterator[None]:
        """Train the word."""
        config, concept, backbone = self.config, target.concept, target.backbone
        generator, names = target.generator("train"), encoders(target, config.encoders)
        self._word = begun(target, names, NEUTRAL[concept.kind], config.vectors, generator)
        examples, like = target.examples.to(backbone.device, backbone.dtype), target.encode([""])

        def draw(latents: torch.Tensor) -> Points:
            return points(backbone, target.protocol, latents, len(latents), generator)

        loss, how = target.loss, {"steps": config.steps, "batch": config.batch}
        learn(self._word, target, concept.templates, examples, loss, draw, like=like, lr=config.lr, generator=generator, **how)
        yield

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """The prompt with the word in the concept's place."""
        phrase = target.concept.find(prompt.text)
        template = whole_words(phrase).sub("{}", prompt.text, count=1) if phrase else "{}"
        with torch.no_grad():
            cond = on_cpu(self._word.read(target, template, target.encode([prompt.text])))
        for i in range(self.config.queries):
            yield Draw(cond, [prompt.seed + 8_000_000 * i])
