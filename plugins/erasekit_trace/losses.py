"""TRACE's loss terms as pure functions of predictions. Predictions are (b, ...) in the model's own form."""

from __future__ import annotations

import torch


def weighted_error(prediction: torch.Tensor, target: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of weight * |prediction - target|^2 (Thm 3.5's alpha_t and beta_t with an l2 divergence).

    The mean is over all of the batch, not over the weights: a sample outside of the window counts as zero.
    """
    difference = (prediction - target).flatten(1)
    error_B = difference.to(torch.promote_types(difference.dtype, torch.float32)).square().mean(1)
    return (weight_B.to(error_B) * error_B).mean()


def preserve_weight(tau_B: torch.Tensor, early: float) -> torch.Tensor:
    """beta(tau) = 1 + early (1 - tau): drift of clean prompts costs more in the early steps (section 4.2)."""
    return 1 + early * (1 - tau_B)


def presence(prediction: torch.Tensor, concept: torch.Tensor, neutral: torch.Tensor) -> torch.Tensor:
    """How much of a concept a prediction holds (b,): 0 where it is the neutral one, 1 where it is the concept's own.

    The coordinate of the prediction along f(c_w) - f(c_u), the teacher's direction of the concept.
    """
    direction = (concept - neutral).flatten(1)
    return ((prediction - neutral).flatten(1) * direction).sum(1) / direction.square().sum(1).clamp_min(1e-8)


def integration(pair_KB: torch.Tensor, single_KB: torch.Tensor) -> torch.Tensor:
    """L_int (section 4.3): presence of either concept on a joint prompt may not exceed that on its own prompt.

    Args:
        pair_KB: presence of concept k = 1, 2 under the prompt that holds both.
        single_KB: presence of concept k under the prompt that holds it alone, the reference.
    """
    return (pair_KB - single_KB.detach().clamp_min(0)).clamp_min(0).square().mean()
