"""What EraseAnything trains on: pictures by the base, wordings of the concept, and other words to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from erasekit.attention import token_positions
from erasekit.backbone import Conditioning
from erasekit.concepts import Concept
from erasekit.errors import UsageError
from erasekit.method import RunContext
from erasekit.pictures import draw
from erasekit.sites import concept_prompts
from erasekit_eraseanything.words import SYNONYMS, UNRELATED, find, reword

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
        x0: pictures of it by the base, finished latents.
        wordings: prompts of those pictures; `versions` of each, one after the other.
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


def synonyms_of(concept: Concept, given: dict[str, tuple[str, ...]]) -> list[str]:
    """Other words for a concept: its further phrases, and those of the settings or else of our list."""
    listed = given.get(concept.name, SYNONYMS.get(concept.name.lower(), ()))
    return [word for word in dict.fromkeys([*concept.phrases[1:], *listed]) if word != concept.phrases[0]]


def unrelated_to(concepts: Sequence[Concept], concept: Concept, given: Sequence[str]) -> list[str]:
    """Words that have nothing to do with a concept: those of the settings, or what it preserves, or our list."""
    erased = {phrase for other in concepts for phrase in other.phrases}
    lists = ([word for word in words if word not in erased] for words in (given, concept.preserve, UNRELATED))
    return next(words for words in lists if words)


def material(
    ctx: RunContext,
    concept: Concept,
    *,
    pictures: int,
    versions: int,
    shuffle: float,
    swap: float,
    synonyms: dict[str, tuple[str, ...]],
    unrelated: Sequence[str],
) -> Material:
    """Draw the pictures and encode all prompts of one concept.

    Raises:
        UsageError: no prompt holds a phrase of the concept.
    """
    encode, generator = ctx.backbone.encode, ctx.generator(f"eraseanything/{concept.name}")
    prompts = [prompt for prompt in concept_prompts(concept, ctx.prompts("erase")) if find(prompt, concept.phrases)]
    if not prompts:
        raise UsageError(f"No prompt of '{concept.name}' holds its phrases ({', '.join(concept.phrases)}) as whole words.")
    chosen = [prompts[i % len(prompts)] for i in range(pictures)]
    seeds = torch.randint(2**31, (pictures,), generator=generator).tolist()
    others = synonyms_of(concept, synonyms)
    said = []
    for prompt in chosen:
        said.append(reword(prompt, find(prompt, concept.phrases), others, generator, shuffle=0, swap=0))
        said += [
            reword(prompt, find(prompt, concept.phrases), others, generator, shuffle=shuffle, swap=swap)
            for _ in range(versions - 1)
        ]
    tokens = [token_positions(ctx.backbone, [text], [phrase]) for text, phrase, _ in said]
    compared = [concept.neutral] if concept.neutral else []
    compared += unrelated_to(ctx.concepts, concept, unrelated)
    return Material(
        x0=draw(ctx, encode(chosen), seeds),
        wordings=Prompts(encode([text for text, _, _ in said]), torch.cat(tokens)),
        neutral=encode([frame.replace("{}", concept.neutral) if concept.neutral else "" for _, _, frame in said]),
        versions=versions,
        itself=_in_templates(ctx, concept, concept.phrases[0]),
        synonyms=[_in_templates(ctx, concept, word) for word in others],
        others=[_in_templates(ctx, concept, word) for word in compared],
    )


def _in_templates(ctx: RunContext, concept: Concept, word: str) -> Prompts:
    texts = [template.format(word) for template in concept.templates[:TEMPLATES]]
    return Prompts(ctx.backbone.encode(texts), token_positions(ctx.backbone, texts, [word]))
