"""The sampler of attacks: the backbone's own steps, so that an image can begin half way and every step can be changed."""

from __future__ import annotations

from typing import Any

import torch

from erasekit.attacks.draw import Draw
from erasekit.attacks.target import ErasedModel
from erasekit.backbones.sampler import follow
from erasekit.errors import ErasekitError


def latents(model: ErasedModel, draw: Draw) -> torch.Tensor:
    """Finished latents x0 (n, ...) of a batch.

    Raises:
        ErasekitError: they are no finite numbers.
    """
    backbone, protocol = model.ctx.backbone, model.ctx.protocol

    def direction(x: torch.Tensor, tau: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        prediction = model.follow(x, tau, draw.cond[rows])
        if draw.bend is None:
            return prediction
        with torch.enable_grad():
            return draw.bend(x, tau, prediction).detach()

    begin = None if draw.x is None else draw.x.to(backbone.device, backbone.dtype)
    batch = protocol.batch if draw.plain else max(1, len(draw.seeds))
    how: dict[str, Any] = {"steps": protocol.steps, "size": protocol.size, "batch": batch, "what": ""}
    with torch.no_grad():
        x = follow(backbone, draw.seeds, direction, begin=begin, first=draw.first, after=draw.after, **how)
    if not torch.isfinite(x).all():
        raise ErasekitError("An attack made the model draw what is no finite number. Use '-s backbone.dtype=float32'.")
    return x


@torch.no_grad()
def images(model: ErasedModel, x0: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, h, w), uint8, of finished latents."""
    backbone, batch = model.ctx.backbone, model.ctx.protocol.batch
    decoded = torch.cat([backbone.decode(rows.to(backbone.device)) for rows in x0.split(batch)])
    return ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
