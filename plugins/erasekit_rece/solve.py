"""RECE's adversarial embedding as a pure function, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from erasekit.closedform import RidgeUnit, ridge_solve


def adversary(
    base: Sequence[torch.Tensor],
    edited: Sequence[torch.Tensor],
    concept_ND: torch.Tensor,
    *,
    ridge: float,
    unit: RidgeUnit = "relative",
) -> torch.Tensor:
    """The embeddings c' that the edited layers read most like the base layers read c (ECCV 2024, section 3.2), (n, width).

    They minimise sum_l |W'_l c' - W_l c|^2 + ridge |c'|^2 over the layers l, so that
    c' = (ridge I + sum_l W'_l^T W'_l)^-1 sum_l W'_l^T W_l c.

    Args:
        base: the weights W_l (out, width).
        edited: the weights W'_l.
        concept_ND: c, one embedding a row.
        ridge: how strongly c' is held small, as it is or relative to the mean diagonal of the sum (see `unit`).
        unit: what `ridge` is meant in.
    """
    c_DN = concept_ND.double().T
    pairs = [(old.double(), new.double()) for old, new in zip(base, edited, strict=True)]
    gram_DD = sum((new.T @ new for _, new in pairs), torch.zeros_like(c_DN @ c_DN.T))
    right_DN = sum((new.T @ (old @ c_DN) for old, new in pairs), torch.zeros_like(c_DN))
    scale = float(gram_DD.diagonal().mean()) if unit == "relative" else 1.0
    return ridge_solve(gram_DD, right_DN, ridge=ridge * scale).T
