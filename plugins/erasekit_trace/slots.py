"""The parts of TRACE that can be swapped: refinements, windows and banks. Each is a registered component."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from erasekit import closedform
from erasekit.closedform import TextEdit
from erasekit.concepts import Concept

if TYPE_CHECKING:
    from erasekit_trace.config import TraceConfig


@dataclass(frozen=True)
class Embeddings:
    """What a refinement is computed from, float64, for the sites that read one kind of text.

    Attributes:
        concept_ND: embeddings of concept prompts, from the concept's first token to the last pad.
        neutral_ND: the embedding that each of them should act like.
        preserve_MD: embeddings of prompts that must not change.
        caption_MD: embeddings of captions of all kinds, for the covariance.
    """

    concept_ND: torch.Tensor
    neutral_ND: torch.Tensor
    preserve_MD: torch.Tensor
    caption_MD: torch.Tensor


def eq1(e: Embeddings, config: TraceConfig) -> TextEdit:
    """The paper's Eq. 1."""
    return closedform.eq1(e.concept_ND, e.neutral_ND)


def delta(e: Embeddings, config: TraceConfig) -> TextEdit:
    """The paper's Prop. 3.2."""
    return closedform.delta_projection(e.concept_ND, e.neutral_ND)


def whitened(e: Embeddings, config: TraceConfig) -> TextEdit:
    """The least change on what is to be kept: weighted by the covariance of captions and of the preserved prompts."""
    covariance = closedform.covariance(e.caption_MD)
    if len(e.preserve_MD):
        covariance = covariance + config.preserve_scale * closedform.covariance(e.preserve_MD)
    return closedform.whitened(e.concept_ND, e.neutral_ND, covariance, ridge=config.ridge, fix_neutral=config.fix_neutral)


def uce(e: Embeddings, config: TraceConfig) -> TextEdit:
    """UCE's ridge solution with the preserved prompts held, and captions of all kinds."""
    held_MD = torch.cat([e.preserve_MD * config.preserve_scale**0.5, e.caption_MD * config.caption_scale**0.5])
    return closedform.uce(e.concept_ND, e.neutral_ND, held_MD, lamb=config.ridge, erase_scale=1.0, preserve_scale=1.0)


def no_refinement(e: Embeddings, config: TraceConfig) -> None:
    """Leave stage 1 out."""


Weights = Callable[[torch.Tensor], torch.Tensor]


def late(config: TraceConfig) -> Weights:
    """Only tau >= tau0 is trained (section 4.2)."""
    return lambda tau: (tau >= config.tau0 - 1e-6).to(tau.dtype)


def early(config: TraceConfig) -> Weights:
    """Only tau < tau0: the window of methods that erase in the first steps."""
    return lambda tau: (tau < config.tau0 - 1e-6).to(tau.dtype)


def full(config: TraceConfig) -> Weights:
    """The whole trajectory, TRACE without its trajectory constraint."""
    return torch.ones_like


def soft(config: TraceConfig) -> Weights:
    """A logistic rise around tau0, a tenth wide."""
    return lambda tau: torch.sigmoid((tau - config.tau0) / 0.025)


@dataclass(frozen=True)
class Adapter:
    """One LoRA of a bank: its name, its rank, and the indices of the concepts that train it."""

    name: str
    rank: int
    concepts: tuple[int, ...]


def per_concept(concepts: Sequence[Concept], config: TraceConfig) -> list[Adapter]:
    """A LoRA of its own for each concept, all active, one trained at a time (sections 4.2 and 4.3)."""
    return [Adapter(c.name, config.rank, (i,)) for i, c in enumerate(concepts)]


def shared(concepts: Sequence[Concept], config: TraceConfig) -> list[Adapter]:
    """One LoRA for all concepts, the paper's ablation 'without separate LoRAs'."""
    return [Adapter("shared", config.rank, tuple(range(len(concepts))))]
