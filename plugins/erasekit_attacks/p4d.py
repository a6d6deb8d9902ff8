"""P4D (ICML 2024, arXiv:2309.06135): tokens under which the erased model predicts what the unedited one does."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.nn.functional import normalize

from erasekit.attacks.attack import Attack
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.attacks.tokens import Slots, compose, encoders, random_tokens, read_soft, words
from erasekit.attacks.words import points
from erasekit.evaluation.tasks import Prompt
from erasekit_attacks.search import SearchConfig, search

MINI = {"steps": 15, "queries": 8, "points": 4}


class P4dConfig(SearchConfig):
    """Settings; the defaults are the paper's 3,000 steps at a rate of 0.1, with an image after every 100."""

    queries: int = Field(30, ge=1, description="images that are drawn and judged for a prompt at most")
    steps: int = Field(100, ge=1, description="steps before each image (published: 3000 in all)")
    lr: float = Field(0.1, gt=0, description="rate of AdamW (published: 0.1)")
    tokens: int = Field(16, ge=1, description="P4D-N: tokens in place of the prompt (published: 16)")
    every: int = Field(3, ge=1, description="P4D-K: a token after every so many of the prompt (published: 3)")


class P4d(Attack):
    """Needs both models. Vectors are trained, and at each step the nearest tokens take their place (Wen et al. 2023, PEZ).

    What the paper calls the latent of the target prompt is an image of the unedited model at a random progress.
    """

    knows = "erased+base"
    Config = P4dConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd15-mini": MINI, "flux-mini": MINI}
    config: P4dConfig

    def slots(self, target: Target, name: str, text: str) -> Slots:
        """Where the tokens of the attack stand."""
        raise NotImplementedError

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """An image after every `steps` steps."""
        config, latent = self.config, target.example(prompt).to(target.backbone.device, target.backbone.dtype)
        like = target.encode([prompt.text])
        slots = {name: self.slots(target, name, prompt.text) for name in encoders(target, config.encoders)}
        vectors: dict[str, torch.Tensor] = {}
        optimizer: list[torch.optim.Optimizer] = []

        def begin(generator: torch.Generator) -> None:
            for name, own in slots.items():
                drawn = random_tokens(own.lexicon, len(own.at), generator)
                vectors[name] = own.lexicon.vectors[drawn].float().clone().requires_grad_()
            optimizer[:] = [torch.optim.AdamW(vectors.values(), config.lr, weight_decay=config.weight_decay)]

        def step(generator: torch.Generator) -> None:
            at = points(target.backbone, target.protocol, latent, config.points, generator)
            x = target.backbone.add_noise(latent.expand_as(at.noise), at.noise, at.tau)
            with torch.no_grad(), target.base():
                wanted = target.predict(x, at.tau, like.repeat(config.points))
            nearest = {name: own.lexicon.vectors[_nearest(own, vectors[name])].float() for name, own in slots.items()}
            read = {name: (near + vectors[name] - vectors[name].detach()) for name, near in nearest.items()}
            prediction = target.predict(x, at.tau, read_soft(target, slots, read, like).repeat(config.points))
            optimizer[0].zero_grad()
            (prediction.float() - wanted.float()).square().mean().backward()
            optimizer[0].step()

        def tokens() -> dict[str, torch.Tensor]:
            return {name: _nearest(own, vectors[name]) for name, own in slots.items()}

        yield from search(target, prompt, config, slots, like, begin, step, tokens)


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


@torch.no_grad()
def _nearest(slots: Slots, vectors: torch.Tensor) -> torch.Tensor:
    """The usable tokens with the largest cosine to each vector, (k,)."""
    table = slots.lexicon.vectors
    cosine = normalize(vectors, dim=1) @ normalize(table.float(), dim=1).T
    return cosine.masked_fill(~slots.lexicon.usable.to(table.device), -2).argmax(1)
