"""Ring-A-Bell (ICLR 2024, arXiv:2310.10012): a prompt that the text encoder reads as one with more of the concept."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.attacks.tokens import Slots, compose, encoders, random_tokens, read_hard, spelled
from erasekit.evaluation.tasks import Prompt

MINI = {"population": 64, "generations": 40, "queries": 4, "together": 16}


class RingABellConfig(AttackConfig):
    """Settings; the defaults are the paper's for nudity (for violence its eta is 5 or 5.5)."""

    queries: int = Field(
        1, ge=1, description="images that are drawn and judged for a prompt at most: the best of the population"
    )
    tokens: int = Field(16, ge=1, description="length K of the prompt (published: 16, 38 or 77)")
    eta: float = Field(3.0, ge=0, description="how much of the concept is added (published: 3)")
    population: int = Field(200, ge=4, description="prompts in a generation (published: 200)")
    generations: int = Field(3000, ge=0, description="generations (published: 3000)")
    mutation: float = Field(0.25, ge=0, le=1, description="share of children that change a token (published: 0.25)")
    crossover: float = Field(0.5, ge=0, le=1, description="share of children with two parents (published: 0.5)")
    encoders: tuple[str, ...] = Field((), description="text encoders that are searched; none named: all")


class RingABell(Attack):
    """Needs the text encoder alone: what it finds for one erasure it finds for all.

    The concept is the mean difference of what the encoder makes of prompts with it and without. A genetic search looks for
    tokens that are read like the prompt plus eta times that. Models with two text encoders are searched one by one.
    """

    name = "ring-a-bell"
    knows = "text encoder"
    Config = RingABellConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd15-mini": MINI, "flux-mini": MINI}
    config: RingABellConfig

    def __init__(self, config: Any) -> None:
        """Nothing is known of the concept yet."""
        super().__init__(config)
        self._concept: dict[str, torch.Tensor] = {}

    @contextmanager
    def ready(self, target: Target) -> Iterator[None]:
        """The concept's direction in each encoder."""
        concept = target.concept
        texts = concept.prompts()
        sides = (texts, [concept.neutralise(text) for text in texts])
        for name in encoders(target, self.config.encoders):
            with_it, without = (_outputs(target, name, target.tokenize(side)[name]) for side in sides)
            self._concept[name] = (with_it - without).mean(0)
        yield

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """The best of the last generation, best first."""
        config, generator = self.config, target.generator_of(prompt)
        slots = {name: compose(target, name, [config.tokens]) for name in self._concept}
        found = {name: self._search(target, name, own, prompt.text, generator) for name, own in slots.items()}
        like = target.encode([prompt.text])
        for i in range(min(config.queries, config.population)):
            tokens = {name: rows[i] for name, rows in found.items()}
            yield Draw(read_hard(target, slots, tokens, like), [prompt.seed], [spelled(target, slots, tokens)])

    def _search(self, target: Target, name: str, slots: Slots, text: str, generator: torch.Generator) -> torch.Tensor:
        """Token ids (population, k), the best first."""
        config, k = self.config, len(slots.at)
        goal = _outputs(target, name, target.tokenize([text])[name])[0] + config.eta * self._concept[name]

        def errors(rows_PK: torch.Tensor) -> torch.Tensor:
            ids = slots.ids.repeat(len(rows_PK), 1)
            ids[:, slots.at] = rows_PK
            return (_outputs(target, name, ids) - goal).square().flatten(1).mean(1).cpu()

        rows_PK = random_tokens(slots.lexicon, config.population * k, generator).view(config.population, k)
        error_P = errors(rows_PK)
        for _ in range(config.generations):
            children_CK = self._children(rows_PK[: config.population // 2], slots, generator)
            rows_PK = torch.cat([rows_PK, children_CK])
            error_P = torch.cat([error_P, errors(children_CK)])
            best = error_P.argsort()[: config.population]
            rows_PK, error_P = rows_PK[best], error_P[best]
        return rows_PK[error_P.argsort()]

    def _children(self, parents_HK: torch.Tensor, slots: Slots, generator: torch.Generator) -> torch.Tensor:
        """As many children as parents: a copy of one, crossed with another one at one place, and one token changed."""
        n, k = parents_HK.shape
        other_HK = parents_HK[torch.randint(n, (n,), generator=generator)]
        cut_H = torch.randint(1, max(2, k), (n,), generator=generator)
        crossed_H = torch.rand(n, generator=generator) < self.config.crossover
        mix_HK = crossed_H[:, None] & (torch.arange(k)[None] >= cut_H[:, None])
        children_HK = torch.where(mix_HK, other_HK, parents_HK)
        changed_H = (torch.rand(n, generator=generator) < self.config.mutation) | ~crossed_H
        place_H, fresh_H = torch.randint(k, (n,), generator=generator), random_tokens(slots.lexicon, n, generator)
        rows = changed_H.nonzero()[:, 0]
        children_HK[rows, place_H[rows]] = fresh_H[rows]
        return children_HK


@torch.no_grad()
def _outputs(target: Target, name: str, ids: torch.Tensor) -> torch.Tensor:
    """What a text encoder makes of prompts, (n, ...): the field of a Conditioning that it fills."""
    found = target.embed({name: ids}, like=target.encode([""]).repeat(len(ids)))
    outputs: torch.Tensor = getattr(found, target.backbone.reads[name])
    return outputs.float()
