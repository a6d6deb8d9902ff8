"""MACE's two closed forms. Both are the ridge problem that UCE solves, with other embeddings and other targets.

They fit W' to targets Y on inputs x while keeping W on inputs p, through
W' - W = sum (Y - W x) x^T M^-1 with M = sum x x^T + s sum p p^T + lamb tr(.)/width I,
so their solution is exact in the factors of Y - W x and never forms a full matrix (out, width).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from erasekit import closedform
from erasekit.closedform import TextEdit
from erasekit.deltas import LowRank, compress


def refinement(
    concept_ND: torch.Tensor, neutral_ND: torch.Tensor, preserve_MD: torch.Tensor, *, lamb: float, preserve_scale: float
) -> TextEdit:
    """Closed-form refinement (section 4.1): words beside the concept act like the same words beside the neutral one.

    Minimises sum |W' e_f - W e_g|^2 + s sum |(W' - W) e_p|^2 + lamb tr(M)/width |W' - W|^2.

    Args:
        concept_ND: e_f, the words outside of the concept's phrase in prompts that hold it.
        neutral_ND: e_g, what each of them is in the neutral prompt.
        preserve_MD: e_p, embeddings of what is kept.
        lamb: ridge, relative to the mean of the system's diagonal.
        preserve_scale: s.
    """
    return closedform.uce(concept_ND, neutral_ND, preserve_MD, lamb=lamb, erase_scale=1.0, preserve_scale=preserve_scale)


def fusion(
    inputs: Sequence[torch.Tensor], preserve_MD: torch.Tensor, *, lamb: float, preserve_scale: float
) -> list[torch.Tensor]:
    """Fusion (section 4.3): of each concept the matrix K_i (width, width) that makes W' = W + sum_i Delta_i K_i the fit.

    It minimises sum_i sum_x |(W' - W - Delta_i) x|^2 + s sum_p |(W' - W) p|^2 + lamb tr(M)/width |W' - W|^2 with x in
    `inputs[i]`: a concept's own prompts meet its own change Delta_i, what is kept meets none. K_i = sum_x x x^T M^-1.
    """
    rows = torch.cat(list(inputs))
    solved = closedform.uce(rows, rows, preserve_MD, lamb=lamb, erase_scale=1.0, preserve_scale=preserve_scale)
    parts = solved.split([len(x) for x in inputs])
    return [x_ND.double().T @ part.read_ND for x_ND, part in zip(inputs, parts, strict=True)]


def share(changes: Sequence[LowRank], k_DD: torch.Tensor) -> LowRank:
    """One concept's share Delta_i K_i of the fused change, Delta_i the sum of `changes`, with the least rank."""
    up, down = (torch.cat([getattr(c, side).to(k_DD) for c in changes], dim) for side, dim in (("up", 1), ("down", 0)))
    return compress(LowRank(up, down @ k_DD))
