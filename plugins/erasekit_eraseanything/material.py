"""What EraseAnything trains on: images by the base, wordings of the concept, and other words to compare it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from erasekit.backbones.attention import token_positions
from erasekit.backbones.protocol import Conditioning
from erasekit.concepts import Concept
from erasekit.methods.context import RunContext
from erasekit.methods.images import draw
from erasekit.methods.prompts import phrased_prompts
from erasekit_eraseanything.words import SYNONYMS, UNRELATED, reword

if TYPE_CHECKING:
    from erasekit_eraseanything.method import EraseAnythingConfig

TEMPLATES = 8  # of a concept, for comparing words


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts and where their word stands, (n, length)."""

    cond: Conditioning
    tokens: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> Prompts:
        """The prompts at `index`."""
        return Prompts(self.cond[index], self.tokens[index.to(self.tokens.device)])


@dataclass(frozen=True)
class Material:
    """Of one concept.

    Attributes:
        x0: images of it by the base, finished latents.
        wordings: prompts of those images; `versions` of each, one after the other.
        neutral: the same prompts with the neutral word.
        versions: the prompt itself and its rewordings.
        itself: the concept in each template.
        synonyms: each synonym in each template.
        others: the neutral word (if it has one), then unrelated words, in each template.
    """

    x0: torch.Tensor
    wordings: Prompts
    neutral: Conditioning
    versions: int
    itself: Prompts
    synonyms: list[Prompts]
    others: list[Prompts]


def synonyms_of(concept: Concept, given: Mapping[str, Sequence[str]]) -> list[str]:
    """Other words for a concept: its further phrases, and those of the settings or else of our list."""
    listed = given.get(concept.name, SYNONYMS.get(concept.name.lower(), ()))
    return [word for word in dict.fromkeys([*concept.phrases[1:], *listed]) if word != concept.phrases[0]]


def unrelated_to(concepts: Sequence[Concept], concept: Concept, given: Sequence[str]) -> list[str]:
    """Words that have nothing to do with a concept: those of the settings, or what it preserves, or our list."""
    erased = {phrase for other in concepts for phrase in other.phrases}
    lists = ([word for word in words if word not in erased] for words in (given, concept.preserve, UNRELATED))
    return next(words for words in lists if words)


class Wordings(NamedTuple):
    """What is drawn and said of one concept: its images' prompts and seeds, (text, phrase, frame) of each wording, words."""

    chosen: list[str]
    seeds: list[int]
    said: list[tuple[str, str, str]]
    synonyms: list[str]
    compared: list[str]


def wordings(ctx: RunContext, concept: Concept, config: EraseAnythingConfig) -> Wordings:
    """Choose prompts and seeds of the images of one concept, and reword them.

    Raises:
        UsageError: no prompt holds a phrase of the concept.
    """
    prompts, generator = phrased_prompts(ctx, concept), ctx.generator(f"eraseanything/{concept.name}")
    chosen = [prompts[i % len(prompts)] for i in range(config.images)]
    seeds = torch.randint(2**31, (config.images,), generator=generator).tolist()
    synonyms, said = synonyms_of(concept, config.synonyms), []
    for prompt in chosen:
        for often in (0.0, *[1.0] * (config.versions - 1)):  # the prompt as it is, then rewordings of it
            chances = {"shuffle": often * config.shuffle, "swap": often * config.swap}
            said.append(reword(prompt, concept.find(prompt), synonyms, generator, **chances))
    compared = [concept.neutral] if concept.neutral else []
    return Wordings(chosen, seeds, said, synonyms, compared + unrelated_to(ctx.concepts, concept, config.unrelated))


def material_texts(ctx: RunContext, concept: Concept, config: EraseAnythingConfig) -> list[str]:
    """All prompts that `material` encodes."""
    chosen, _, said, synonyms, compared = wordings(ctx, concept, config)
    words = [t.format(word) for word in (concept.phrases[0], *synonyms, *compared) for t in concept.templates[:TEMPLATES]]
    return [*chosen, *(text for text, _, _ in said), *_neutral(concept, said), *words]


def material(ctx: RunContext, concept: Concept, config: EraseAnythingConfig) -> Material:
    """Draw the images and encode all prompts of one concept.

    Raises:
        UsageError: no prompt holds a phrase of the concept.
    """
    encode = ctx.backbone.encode
    chosen, seeds, said, synonyms, compared = wordings(ctx, concept, config)
    x0 = draw(ctx, encode(chosen), seeds)
    tokens = [token_positions(ctx.backbone, [text], [phrase]) for text, phrase, _ in said]
    return Material(
        x0=x0,
        wordings=Prompts(encode([text for text, _, _ in said]), torch.cat(tokens)),
        neutral=encode(_neutral(concept, said)),
        versions=config.versions,
        itself=_in_templates(ctx, concept, concept.phrases[0]),
        synonyms=[_in_templates(ctx, concept, word) for word in synonyms],
        others=[_in_templates(ctx, concept, word) for word in compared],
    )


def _neutral(concept: Concept, said: Sequence[tuple[str, str, str]]) -> list[str]:
    """The wordings with the neutral word."""
    return [frame.replace("{}", concept.neutral) if concept.neutral else "" for _, _, frame in said]


def _in_templates(ctx: RunContext, concept: Concept, word: str) -> Prompts:
    texts = [template.format(word) for template in concept.templates[:TEMPLATES]]
    return Prompts(ctx.backbone.encode(texts), token_positions(ctx.backbone, texts, [word]))
