"""UnlearnDiffAtk (ECCV 2024, arXiv:2310.11868): tokens before the prompt under which the erased model explains an image."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.attacks.attack import Attack
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.attacks.tokens import compose, encoders, read_soft
from erasekit.attacks.words import points
from erasekit.evaluation.tasks import Prompt
from erasekit_attacks.search import SearchConfig, search
from erasekit_attacks.simplex import project

MINI = {"steps": 15, "queries": 8, "points": 4, "lr": 0.05}


class UnlearnDiffConfig(SearchConfig):
    """Settings; the defaults are the paper's for objects and styles (for nudity it has 5 tokens)."""

    queries: int = Field(50, ge=1, description="images that are drawn and judged for a prompt at most (published: 50)")
    tokens: int = Field(3, ge=1, description="tokens before the prompt (published: 3, nudity 5)")


class UnlearnDiff(Attack):
    """Needs an image of the concept and the erased model, and neither the unedited one nor a classifier.

    Each token before the prompt is a mixture of all that the encoder has. Adam takes the mixtures where the model's denoising
    error on the image falls, and each step is projected on the simplex. What is drawn has the largest part of each mixture.
    """

    name = "unlearndiff"
    knows = "erased"
    Config = UnlearnDiffConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd15-mini": MINI, "flux-mini": MINI}
    config: UnlearnDiffConfig

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """An image after every `steps` steps."""
        config, latent = self.config, target.example(prompt).to(target.backbone.device, target.backbone.dtype)
        like, names = target.encode([prompt.text]), encoders(target, config.encoders)
        slots = {name: compose(target, name, [config.tokens, prompt.text]) for name in names}
        tables = {name: own.lexicon.vectors.float() for name, own in slots.items()}
        mixtures: dict[str, torch.Tensor] = {}
        optimizer: list[torch.optim.Optimizer] = []

        def begin(generator: torch.Generator) -> None:
            for name, own in slots.items():
                drawn = torch.rand(config.tokens, len(own.lexicon.usable), generator=generator)
                mixtures[name] = self._kept(drawn / drawn.sum(1, keepdim=True), own).requires_grad_()
            optimizer[:] = [torch.optim.AdamW(mixtures.values(), config.lr, weight_decay=config.weight_decay)]

        def step(generator: torch.Generator) -> None:
            at = points(target.backbone, target.protocol, latent, config.points, generator)
            vectors = {name: mixtures[name] @ tables[name] for name in slots}
            cond = read_soft(target, slots, vectors, like).repeat(config.points)
            loss = target.loss(latent.expand_as(at.noise), cond, at.tau, at.noise)
            optimizer[0].zero_grad()
            loss.backward()
            optimizer[0].step()
            with torch.no_grad():
                for name, own in slots.items():
                    mixtures[name].copy_(self._kept(mixtures[name], own))

        def tokens() -> dict[str, torch.Tensor]:
            return {name: mixtures[name].argmax(1) for name in slots}

        yield from search(target, prompt, config, slots, like, begin, step, tokens)

    @staticmethod
    def _kept(mixture: torch.Tensor, slots: Any) -> torch.Tensor:
        """The nearest mixtures of usable tokens."""
        table, usable = slots.lexicon.vectors, slots.lexicon.usable
        mixture = mixture.to(table.device, torch.float32)
        return project(mixture.masked_fill(~usable.to(table.device), float("-inf")))
