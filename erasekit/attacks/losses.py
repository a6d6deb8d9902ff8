"""How well a model with some conditioning explains an image: what white-box attacks minimise."""

from __future__ import annotations

import torch

from erasekit.backbones.protocol import Backbone, Conditioning, Predict


def denoise_loss(
    backbone: Backbone,
    latent: torch.Tensor,
    conditioning: Conditioning,
    tau: torch.Tensor,
    noise: torch.Tensor,
    *,
    predict: Predict | None = None,
) -> torch.Tensor:
    """The error of a prediction on the way from noise to an image, mean of squares; differentiable.

    A model that predicts epsilon is held against the noise (Ho et al. 2020, Eq. 14), one that predicts velocity against
    noise - x0 (Lipman et al. 2023; Liu et al. 2023).

    Args:
        backbone: says what its predictions are.
        latent: x0 (b, ...), finished latents.
        conditioning: the encoded prompts, b rows.
        tau: progress (b,).
        noise: (b, ...).
        predict: the model, where it is not the backbone as it stands.
    """
    x = backbone.add_noise(latent, noise, tau)
    prediction = (predict or backbone.predict)(x, tau, conditioning)
    wanted = noise if backbone.capabilities.prediction == "epsilon" else noise - latent
    return (prediction.float() - wanted.float()).square().mean()
