"""RECE's adversarial embedding as a pure function of the embedding, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from erasekit.methods.closedform import RidgeUnit, ridge_solve


def adversary(
    base: Sequence[torch.Tensor],
    edited: Sequence[torch.Tensor],
    *,
    ridge: float,
    unit: RidgeUnit = "relative",
) -> torch.Tensor:
    """The matrix A (width, width) of the embeddings c' = A c that edited layers read most like the base layers read c.

    For any c they minimise sum_l |W'_l c' - W_l c|^2 + ridge |c'|^2 over the layers l (ECCV 2024, section 3.2), so that
    A = (ridge I + sum_l W'_l^T W'_l)^-1 sum_l W'_l^T W_l.

    Args:
        base: the weights W_l (out, width).
        edited: the weights W'_l.
        ridge: how strongly c' is held small, as it is or relative to the mean diagonal of the sum (see `unit`).
        unit: what `ridge` is meant in.
    """
    old, new = (torch.cat([weight.double() for weight in weights]) for weights in (base, edited))
    gram_DD = new.T @ new
    scale = float(gram_DD.diagonal().mean()) if unit == "relative" else 1.0
    return ridge_solve(gram_DD, new.T @ old, ridge=ridge * scale)
