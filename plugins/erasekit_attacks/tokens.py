"""Prompts in which some tokens are an attack's: where they stand, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from erasekit.attacks.target import Target
from erasekit.backbones.protocol import Conditioning, Lexicon
from erasekit.errors import UsageError


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


def compose(target: Target, encoder: str, parts: Sequence[str | torch.Tensor | int]) -> Slots:
    """Put a prompt together from texts, ids, and numbers of slots; what is too long for the encoder is cut at its end."""
    lexicon = target.lexicon(encoder)
    empty = target.backbone.tokenize([""])[encoder][0]
    ids, slots = empty[: lexicon.begin].tolist(), list[int]()
    for part in parts:
        if isinstance(part, int):
            slots += range(len(ids), len(ids) + part)
            ids += [int(lexicon.usable.nonzero()[0])] * part
        else:
            ids += words(target, encoder, part).tolist() if isinstance(part, str) else part.tolist()
    ids = [*ids[: len(empty) - 1], lexicon.end]
    ids += [lexicon.pad] * (len(empty) - len(ids))
    at = [slot for slot in slots if slot < len(empty) - 1]
    return Slots(torch.tensor([ids]), torch.tensor(at, dtype=torch.long), lexicon)


def words(target: Target, encoder: str, text: str) -> torch.Tensor:
    """The ids of a text alone, without begin, end and pad tokens."""
    lexicon, ids = target.lexicon(encoder), target.backbone.tokenize([text])[encoder][0]
    end = int((ids == lexicon.end).int().argmax())
    return ids[lexicon.begin : end]


def encoders(target: Target, chosen: Sequence[str]) -> tuple[str, ...]:
    """The text encoders that are attacked: those that are chosen, or all.

    Raises:
        UsageError: the model has no such encoder.
    """
    own = target.backbone.encoders
    if wrong := [name for name in chosen if name not in own]:
        raise UsageError(f"'{target.backbone.name}' has no text encoder '{wrong[0]}'; it has {', '.join(own)}.")
    return tuple(chosen) or own


def read_soft(
    target: Target, slots: Mapping[str, Slots], vectors: Mapping[str, torch.Tensor], like: Conditioning
) -> Conditioning:
    """Encode a prompt with vectors in its slots; what other encoders make of it is taken from `like`."""
    ids = {name: own.ids for name, own in slots.items()}
    return target.embed(ids, {name: own.soft(vectors[name]) for name, own in slots.items()}, like=like)


@torch.no_grad()
def read_hard(
    target: Target, slots: Mapping[str, Slots], tokens: Mapping[str, torch.Tensor], like: Conditioning
) -> Conditioning:
    """Encode a prompt with tokens in its slots."""
    return on_cpu(target.embed({name: own.hard(tokens[name]) for name, own in slots.items()}, like=like))


def on_cpu(cond: Conditioning) -> Conditioning:
    """Encoded prompts where `encode` leaves them."""
    return cond.to("cpu", cond.tokens.dtype)


def spelled(target: Target, slots: Mapping[str, Slots], tokens: Mapping[str, torch.Tensor]) -> str:
    """What somebody would type; for several text encoders the text of each, since pipelines take one for each."""
    texts = [target.backbone.spell(name, own.hard(tokens[name])[0]) for name, own in slots.items()]
    return " | ".join(dict.fromkeys(texts))


def random_tokens(lexicon: Lexicon, k: int, generator: torch.Generator) -> torch.Tensor:
    """`k` usable tokens."""
    usable = lexicon.usable.nonzero()[:, 0]
    return usable[torch.randint(len(usable), (k,), generator=generator)]
