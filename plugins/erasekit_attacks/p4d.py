"""P4D (ICML 2024, arXiv:2309.06135): tokens under which the erased model predicts what the unedited one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.nn.functional import normalize

from erasekit.attacks.target import Target
from erasekit.attacks.tokens import Slots, compose, random_tokens, words
from erasekit_attacks.search import Batch, Search, SearchConfig

MINI = {"steps": 15, "queries": 8, "points": 4, "together": 16}


class P4dConfig(SearchConfig):
    """Settings; the defaults are the paper's 3,000 steps at a rate of 0.1, with an image after every 100."""

    queries: int = Field(30, ge=1, description="images that are drawn and judged for a prompt at most")
    steps: int = Field(100, ge=1, description="steps before each image (published: 3000 in all)")
    lr: float = Field(0.1, gt=0, description="rate of AdamW (published: 0.1)")
    tokens: int = Field(16, ge=1, description="P4D-N: tokens in place of the prompt (published: 16)")
    every: int = Field(3, ge=1, description="P4D-K: a token after every so many of the prompt (published: 3)")


class P4d(Search):
    """Needs both models. Vectors are trained, and at each step the nearest tokens take their place (Wen et al. 2023, PEZ).

    What the paper calls the latent of the target prompt is an image of the unedited model at a random progress.
    """

    knows = "erased+base"
    Config = P4dConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd15-mini": MINI, "flux-mini": MINI}
    config: P4dConfig

    def begun(self, slots: Slots, generator: torch.Generator) -> torch.Tensor:
        """The vectors of tokens at random."""
        return slots.lexicon.vectors[random_tokens(slots.lexicon, len(slots.at), generator)].float().clone()

    def vectors(self, slots: Slots, trained: torch.Tensor) -> torch.Tensor:
        """The nearest tokens' vectors; gradients go to what is trained."""
        nearest = slots.lexicon.vectors[self.tokens(slots, trained)].float()
        return nearest + trained - trained.detach()

    @torch.no_grad()
    def tokens(self, slots: Slots, trained: torch.Tensor) -> torch.Tensor:
        """The usable tokens with the largest cosine to each vector."""
        table = slots.lexicon.vectors
        cosine = normalize(trained, dim=1) @ normalize(table.float(), dim=1).T
        return cosine.masked_fill(~slots.lexicon.usable.to(table.device), -2).argmax(1)

    def loss(self, target: Target, at: Batch) -> torch.Tensor:
        """How far the erased model's prediction is from the unedited one's for the plain prompt."""
        x = target.backbone.add_noise(at.latent, at.noise, at.tau)
        with torch.no_grad(), target.base():
            wanted = target.predict(x, at.tau, at.plain)
        return (target.predict(x, at.tau, at.read).float() - wanted.float()).square().mean()


class P4dN(P4d):
    """P4D-N: `tokens` tokens in place of the prompt."""

    name = "p4d-n"

    def slots(self, target: Target, name: str, text: str) -> Slots:
        """Nothing but slots."""
        return compose(target, name, [self.config.tokens])


class P4dK(P4d):
    """P4D-K: a token after every `every` tokens of the prompt."""

    name = "p4d-k"

    def slots(self, target: Target, name: str, text: str) -> Slots:
        """The prompt with slots in it, one at least."""
        parts: list[torch.Tensor | str | int] = []
        for some in words(target, name, text).split(self.config.every):
            parts += [some, 1]
        return compose(target, name, parts or [1])
