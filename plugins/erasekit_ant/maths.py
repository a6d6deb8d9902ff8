"""ANT's target and its saliency mask, as pure functions."""

from __future__ import annotations

import math

import torch

from erasekit.backbones.schedule import is_late, per_row


def target(concept: torch.Tensor, empty: torch.Tensor, tau_B: torch.Tensor, *, tau0: float, eta: float) -> torch.Tensor:
    """f(0) + eta (f(c) - f(0)) before tau0 and f(0) - eta (f(c) - f(0)) from there on; predictions are (b, ...)."""
    sign_B = 1 - 2 * is_late(tau_B, tau0).to(empty)
    return empty + eta * per_row(sign_B, empty) * (concept - empty)


def salient(gradient: torch.Tensor, keep: float) -> torch.Tensor:
    """The share `keep` of a tensor's entries (at least one) that have the largest absolute gradient, as a mask."""
    size = gradient.abs().flatten()
    least = size.kthvalue(size.numel() - max(1, math.ceil(keep * size.numel())) + 1).values
    return gradient.abs() >= least
