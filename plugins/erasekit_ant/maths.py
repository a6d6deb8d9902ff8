"""ANT's target and its saliency mask, as pure functions."""

from __future__ import annotations

import math

import torch


def late(tau_B: torch.Tensor, tau0: float) -> torch.Tensor:
    """Where the guidance is reversed: tau >= tau0, towards the image (tau is 0 at the noise)."""
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
