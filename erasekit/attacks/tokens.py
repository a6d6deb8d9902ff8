"""Prompts in which some tokens are an attack's: where they stand, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from erasekit.backbones.protocol import Conditioning, Lexicon
from erasekit.errors import UsageError


class TextEncoders(Protocol):
    """What prompts are put together with: a backbone, or the target of an attack, as far as that knows."""

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of the text encoders."""

    def tokenize(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """See `Backbone`."""

    def lexicon(self, encoder: str) -> Lexicon:
        """See `Backbone`."""

    def spell(self, encoder: str, ids: torch.Tensor) -> str:
        """See `Backbone`."""

    def embed(
        self,
        tokens: Mapping[str, torch.Tensor],
        vectors: Mapping[str, torch.Tensor] | None = None,
        *,
        like: Conditioning | None = None,
    ) -> Conditioning:
        """See `Backbone`."""


@dataclass(frozen=True)
class Slots:
    """The ids of one prompt for one text encoder, and the positions in them that are an attack's.

    Attributes:
        ids: (1, length), begin, end and pad tokens included.
        at: (k,) positions.
        lexicon: the encoder's tokens.
    """

    ids: torch.Tensor
    at: torch.Tensor
    lexicon: Lexicon

    def hard(self, tokens: torch.Tensor) -> torch.Tensor:
        """The ids with tokens (k,) in the slots, (1, length)."""
        ids = self.ids.clone()
        ids[0, self.at] = tokens.cpu()
        return ids

    def soft(self, vectors: torch.Tensor) -> torch.Tensor:
        """What the encoder reads with vectors (k, width) in the slots, (1, length, width); differentiable."""
        table = self.lexicon.vectors
        read = table[self.ids[0].to(table.device)].to(vectors.dtype)
        return read.index_copy(0, self.at.to(table.device), vectors)[None]


def compose(texts: TextEncoders, encoder: str, parts: Sequence[str | torch.Tensor | int]) -> Slots:
    """Put a prompt together from texts, ids, and numbers of slots; what is too long for the encoder is cut at its end."""
    lexicon = texts.lexicon(encoder)
    empty = texts.tokenize([""])[encoder][0]
    ids, slots = empty[: lexicon.begin].tolist(), list[int]()
    for part in parts:
        if isinstance(part, int):
            slots += range(len(ids), len(ids) + part)
            ids += [int(lexicon.usable.nonzero()[0])] * part
        else:
            ids += (_words_at(texts, encoder, part, len(ids)) if isinstance(part, str) else part).tolist()
    ids = [*ids[: len(empty) - 1], *empty[lexicon.begin :].tolist()][: len(empty)]  # the end token, and what is behind it
    at = [slot for slot in slots if slot < len(empty) - 1]
    return Slots(torch.tensor([ids]), torch.tensor(at, dtype=torch.long), lexicon)


def _words_at(texts: TextEncoders, encoder: str, text: str, place: int) -> torch.Tensor:
    """The ids of a text at a position of a prompt; behind others it has a space before it, where tokens hold that."""
    lexicon = texts.lexicon(encoder)
    if lexicon.spaced:
        text = f"{' ' if place > lexicon.begin else ''}{text.strip()}".rstrip()
    return words(texts, encoder, text)


def words(texts: TextEncoders, encoder: str, text: str) -> torch.Tensor:
    """The ids of a text alone, without begin, end and pad tokens; a long one may have lost its end token (FLUX.2)."""
    lexicon, ids = texts.lexicon(encoder), texts.tokenize([text])[encoder][0]
    ends = ids == lexicon.end
    return ids[lexicon.begin : int(ends.int().argmax()) if ends.any() else len(ids)]


def encoders(texts: TextEncoders, chosen: Sequence[str]) -> tuple[str, ...]:
    """The text encoders that are attacked: those that are chosen, or all.

    Raises:
        UsageError: the model has no such encoder.
    """
    own = texts.encoders
    if wrong := [name for name in chosen if name not in own]:
        raise UsageError(f"The model has no text encoder '{wrong[0]}'; it has {', '.join(own)}.")
    return tuple(chosen) or own


def read_soft(
    texts: TextEncoders,
    slots: Sequence[Mapping[str, Slots]],
    vectors: Sequence[Mapping[str, torch.Tensor]],
    like: Conditioning,
) -> Conditioning:
    """Encode prompts with vectors in their slots; what other encoders make of them is taken from `like`."""
    names = slots[0].keys()
    ids = {name: torch.cat([own[name].ids for own in slots]) for name in names}
    read = {name: torch.cat([own[name].soft(v[name]) for own, v in zip(slots, vectors, strict=True)]) for name in names}
    return texts.embed(ids, read, like=like)


@torch.no_grad()
def read_hard(
    texts: TextEncoders, slots: Mapping[str, Slots], tokens: Mapping[str, torch.Tensor], like: Conditioning
) -> Conditioning:
    """Encode a prompt with tokens in its slots."""
    return on_cpu(texts.embed({name: own.hard(tokens[name]) for name, own in slots.items()}, like=like))


def on_cpu(cond: Conditioning) -> Conditioning:
    """Encoded prompts where `encode` leaves them."""
    return cond.to("cpu", cond.tokens.dtype)


def spelled(texts: TextEncoders, slots: Mapping[str, Slots], tokens: Mapping[str, torch.Tensor]) -> str:
    """What somebody would type; for several text encoders the text of each, since pipelines take one for each."""
    found = [texts.spell(name, own.hard(tokens[name])[0]) for name, own in slots.items()]
    return " | ".join(dict.fromkeys(found))


def random_tokens(lexicon: Lexicon, k: int, generator: torch.Generator) -> torch.Tensor:
    """`k` usable tokens."""
    usable = lexicon.usable.nonzero()[:, 0]
    return usable[torch.randint(len(usable), (k,), generator=generator)]
