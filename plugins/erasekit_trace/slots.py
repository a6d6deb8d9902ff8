"""The parts of TRACE that can be swapped: refinements, windows and banks. Each is a registered component."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from erasekit.backbones.schedule import is_late
from erasekit.concepts import Concept
from erasekit.methods import closedform
from erasekit.methods.closedform import TextEdit
from erasekit.methods.sites import SiteEmbeddings

if TYPE_CHECKING:
    from erasekit_trace.config import TraceConfig


def eq1(e: SiteEmbeddings, config: TraceConfig) -> list[TextEdit]:
    """The paper's Eq. 1: one vector and one rank for each concept."""
    return closedform.eq1(*_vectors(e, config))


def delta(e: SiteEmbeddings, config: TraceConfig) -> list[TextEdit]:
    """The paper's Prop. 3.2: one vector and one rank for each concept."""
    return closedform.delta_projection(*_vectors(e, config))


def _vectors(e: SiteEmbeddings, config: TraceConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """e_w and e_u of each concept, (concepts, width)."""
    e_w, e_u = e.vectors
    return e_w, e_u if config.e_u == "neutral" else e.end.expand_as(e_w)


def whitened(e: SiteEmbeddings, config: TraceConfig) -> list[TextEdit]:
    """The least change on what is to be kept: weighted by the covariance of captions and of the preserved prompts."""
    covariance_DD = e.captions.mean_DD + config.preserve_scale * e.preserve.mean_DD
    return closedform.whitened(
        e.pairs, covariance_DD, ridge=config.ridge, fix_neutral=config.fix_neutral, error=config.rank_error
    )


def uce(e: SiteEmbeddings, config: TraceConfig) -> list[TextEdit]:
    """UCE's ridge solution with the preserved prompts held, and captions of all kinds."""
    held_DD = config.preserve_scale * e.preserve.total_DD + config.caption_scale * e.captions.total_DD
    return closedform.uce(e.pairs, held_DD, lamb=config.ridge, error=config.rank_error)


def no_refinement(e: SiteEmbeddings, config: TraceConfig) -> None:
    """Leave stage 1 out."""


Weights = Callable[[torch.Tensor], torch.Tensor]


def late(config: TraceConfig) -> Weights:
    """Only tau >= tau0 is trained (section 4.2)."""
    return lambda tau: is_late(tau, config.tau0).to(tau.dtype)


def early(config: TraceConfig) -> Weights:
    """Only tau < tau0: the window of methods that erase in the first steps."""
    return lambda tau: (~is_late(tau, config.tau0)).to(tau.dtype)


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
    """A LoRA of its own for each concept, one trained at a time (sections 4.2 and 4.3)."""
    return [Adapter(c.name, config.rank, (i,)) for i, c in enumerate(concepts)]


def shared(concepts: Sequence[Concept], config: TraceConfig) -> list[Adapter]:
    """One LoRA for all concepts, the paper's ablation 'without separate LoRAs'."""
    return [Adapter("shared", config.rank, tuple(range(len(concepts))))]
