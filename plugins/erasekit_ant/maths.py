"""ANT's target, its saliency mask, and the fusion of its LoRAs, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from erasekit.deltas import LowRank


def late(tau_B: torch.Tensor, tau0: float) -> torch.Tensor:
    """Where the guidance is reversed: tau >= tau0, towards the picture (tau is 0 at the noise)."""
    return tau_B >= tau0 - 1e-6


def target(concept: torch.Tensor, empty: torch.Tensor, tau_B: torch.Tensor, *, tau0: float, eta: float) -> torch.Tensor:
    """f(0) + eta (f(c) - f(0)) before tau0 and f(0) - eta (f(c) - f(0)) from there on; predictions are (b, ...)."""
    sign_B = 1 - 2 * late(tau_B, tau0).to(empty)
    return empty + eta * sign_B.view(-1, *[1] * (empty.dim() - 1)) * (concept - empty)


def salient(gradient: torch.Tensor, keep: float) -> torch.Tensor:
    """The share `keep` of a tensor's entries (at least one) that have the largest absolute gradient, as a mask."""
    size = gradient.abs().flatten()
    least = size.kthvalue(size.numel() - max(1, math.ceil(keep * size.numel())) + 1).values
    return gradient.abs() >= least


def fuse(
    deltas: Sequence[LowRank], moments: Sequence[torch.Tensor], preserve: torch.Tensor, *, weight: float, ridge: float
) -> list[LowRank]:
    """One delta D for all concepts, as the concepts' shares, in float64; MACE's closed form (CVPR 2024).

    D minimises sum_i E|D x_i - D_i x_i|^2 + weight E|D x_p|^2 + ridge m |D|^2, so that on its own inputs x_i each
    concept's LoRA D_i acts as it did alone, and on preserved inputs x_p nothing does. Then D = sum_i D_i C_i M^-1 with
    M = sum_i C_i + weight C_p + ridge m I, and each share has the rank of its LoRA.

    Args:
        deltas: D_i of one layer, (out, in).
        moments: C_i = E[x_i x_i^T], (in, in).
        preserve: C_p, (in, in).
        weight: what drift of preserved inputs costs.
        ridge: positive, relative to m, the mean of the diagonal of the sum of the moments.
    """
    total = torch.stack(list(moments)).double().sum(0) + weight * preserve.double()
    m_II = total + ridge * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype, device=total.device)
    shares = []
    for delta, moment in zip(deltas, moments, strict=True):
        down_RI = torch.linalg.solve(m_II, (delta.down.to(m_II) @ moment.double()).T).T
        shares.append(LowRank(delta.up.to(m_II), down_RI))
    return shares
