"""ESD's negative guidance, in the paper's convention."""

from __future__ import annotations

import torch


def negative_guidance(anchor: torch.Tensor, concept: torch.Tensor, empty: torch.Tensor, eta: float) -> torch.Tensor:
    """The target f(c_anchor) - eta (f(c) - f(0)) of arXiv:2303.07345, whose anchor is the empty prompt; all are (b, ...)."""
    return anchor - eta * (concept - empty)


def eta_of_newer_code(eta: float) -> float:
    """The paper's eta for the `negative_guidance` of ESD's newer code.

    That code's target is f(c) - eta (f(c) - f(0)), the concept itself in the anchor's place, which equals
    f(0) - (eta - 1) (f(c) - f(0)): its 2 is the paper's 1.
    """
    return eta - 1
