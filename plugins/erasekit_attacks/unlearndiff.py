"""UnlearnDiffAtk (ECCV 2024, arXiv:2310.11868): tokens before the prompt under which the erased model explains an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.attacks.target import Target
from erasekit.attacks.tokens import Slots, compose
from erasekit_attacks.search import Batch, Search, SearchConfig
from erasekit_attacks.simplex import project

MINI = {"steps": 15, "queries": 8, "points": 4, "lr": 0.05, "together": 16}


class UnlearnDiffConfig(SearchConfig):
    """Settings; the defaults are the paper's for objects and styles (for nudity it has 5 tokens)."""

    queries: int = Field(50, ge=1, description="images that are drawn and judged for a prompt at most (published: 50)")
    tokens: int = Field(3, ge=1, description="tokens before the prompt (published: 3, nudity 5)")


class UnlearnDiff(Search):
    """Needs an image of the concept and the erased model, and neither the unedited one nor a classifier.

    Each token before the prompt is a mixture of all that the encoder has. Adam takes the mixtures where the model's denoising
    error on the image falls, and each step is projected on the simplex. What is drawn has the largest part of each mixture.
    """

    name = "unlearndiff"
    knows = "erased"
    Config = UnlearnDiffConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd15-mini": MINI, "flux-mini": MINI}
    config: UnlearnDiffConfig

    def slots(self, target: Target, name: str, text: str) -> Slots:
        """Before the prompt."""
        return compose(target, name, [self.config.tokens, text])

    def begun(self, slots: Slots, generator: torch.Generator) -> torch.Tensor:
        """Mixtures at random, (k, tokens of the encoder)."""
        drawn = torch.rand(len(slots.at), len(slots.lexicon.usable), generator=generator)
        return self.held(slots, drawn / drawn.sum(1, keepdim=True))

    def vectors(self, slots: Slots, trained: torch.Tensor) -> torch.Tensor:
        """The mixtures of the tokens' vectors."""
        return trained @ slots.lexicon.vectors.float()

    def tokens(self, slots: Slots, trained: torch.Tensor) -> torch.Tensor:
        """The largest part of each mixture."""
        return trained.argmax(1)

    def loss(self, target: Target, at: Batch) -> torch.Tensor:
        """How badly the erased model explains the image."""
        return target.loss(at.latent, at.read, at.tau, at.noise)

    def held(self, slots: Slots, trained: torch.Tensor) -> torch.Tensor:
        """The nearest mixtures of usable tokens."""
        table, usable = slots.lexicon.vectors, slots.lexicon.usable
        mixture = trained.to(table.device, torch.float32)
        return project(mixture.masked_fill(~usable.to(table.device), float("-inf")))
