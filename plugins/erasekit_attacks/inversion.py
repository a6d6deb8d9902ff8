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
from erasekit.concepts import whole_words
from erasekit.evaluation.tasks import Prompt
from erasekit.events import progress
from erasekit_attacks.search import points
from erasekit_attacks.tokens import Slots, compose, encoders, on_cpu, read_soft, words

MINI = {"steps": 300, "lr": 2e-2}


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
        self._vectors: dict[str, torch.Tensor] = {}

    @contextmanager
    def ready(self, target: Target) -> Iterator[None]:
        """Train the word."""
        config, generator = self.config, target.generator("train")
        names, like = encoders(target, config.encoders), target.encode([""])
        for name in names:
            noun = words(target, name, target.concept.neutral or "something")
            start = target.lexicon(name).vectors[noun].float().mean(0, keepdim=True)
            noise = torch.randn((config.vectors, start.shape[1]), generator=generator).to(start)
            self._vectors[name] = (start + 0.1 * start.std() * noise).requires_grad_()
        optimizer = torch.optim.AdamW(self._vectors.values(), config.lr)
        examples = target.examples.to(target.backbone.device, target.backbone.dtype)
        for step in range(config.steps):
            progress("word", step, config.steps)
            template = target.concept.templates[int(torch.randint(len(target.concept.templates), (1,), generator=generator))]
            chosen = examples[torch.randint(len(examples), (config.batch,), generator=generator)]
            at = points(target, chosen, config.batch, generator)
            slots = {name: self._slots(target, name, template) for name in names}
            cond = read_soft(target, slots, self._vectors, like).repeat(config.batch)
            optimizer.zero_grad()
            target.loss(chosen, cond, at.tau, at.noise).backward()
            optimizer.step()
        progress("word", config.steps, config.steps)
        yield

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """The prompt with the word in the concept's place."""
        phrase = target.concept.find(prompt.text)
        template = whole_words(phrase).sub("{}", prompt.text, count=1) if phrase else "{}"
        slots = {name: self._slots(target, name, template) for name in self._vectors}
        with torch.no_grad():
            cond = on_cpu(read_soft(target, slots, self._vectors, target.encode([prompt.text])))
        for i in range(self.config.queries):
            yield Draw(cond, [prompt.seed + 8_000_000 * i])

    def _slots(self, target: Target, name: str, template: str) -> Slots:
        before, _, after = template.partition("{}")
        return compose(target, name, [before, self.config.vectors, after.replace("{}", "")])
