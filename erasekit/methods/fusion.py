"""How LoRAs that were trained one by one become one edit: the closed-form fusion of MACE (arXiv:2403.06135, section 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from erasekit.backbones.protocol import Conditioning
from erasekit.erasures.deltas import Delta, Deltas, Dense, LowRank, compress
from erasekit.methods.closedform import RidgeUnit, add_products_, ridge_solve
from erasekit.methods.context import RunContext


@torch.no_grad()
def input_moments(
    ctx: RunContext,
    layers: Iterable[str],
    x: torch.Tensor,
    tau: torch.Tensor,
    cond: Conditioning,
) -> dict[str, torch.Tensor]:
    """What layers read while the denoiser predicts for (x, tau, cond), n of each: {layer: sum of r r^T over its rows r}.

    Args:
        ctx: the run.
        layers: paths of linear layers in the denoiser.
        x: latents (n, ...).
        tau: their progress (n,).
        cond: their prompts.

    Returns:
        Matrices (in, in), float64, on the CPU.
    """
    sums: dict[str, torch.Tensor] = {}
    modules = {layer: ctx.backbone.denoiser.get_submodule(layer) for layer in layers}

    def record(layer: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            read = arguments[0].flatten(0, -2).double()
            if layer not in sums:
                sums[layer] = torch.zeros(read.shape[1], read.shape[1], dtype=torch.float64, device=read.device)
            add_products_(sums[layer], read)

        return hook

    handles = [module.register_forward_pre_hook(record(layer)) for layer, module in modules.items()]
    try:
        for chunk in torch.arange(len(x)).split(min(ctx.protocol.batch, ctx.backbone.rows(x))):
            ctx.predict(x[chunk], tau[chunk], cond[chunk])
    finally:
        for handle in handles:
            handle.remove()
    return {layer: total.cpu() for layer, total in sums.items()}


def fusion(
    moments: Sequence[torch.Tensor],
    preserve_DD: torch.Tensor,
    *,
    ridge: float,
    preserve_scale: float,
    unit: RidgeUnit = "relative",
) -> list[torch.Tensor]:
    """Of each concept the matrix K_i (width, width) that makes W' = W + sum_i Delta_i K_i the best fit, float64.

    W' minimises sum_i sum_x |(W' - W - Delta_i) x|^2 + s sum_p |(W' - W) p|^2 + ridge m |W' - W|^2 with x of the inputs of
    concept i: its own inputs meet its own change Delta_i, what is kept meets none. K_i = C_i M^-1, where
    M = sum_i C_i + s C_p + ridge m I.

    Args:
        moments: C_i = sum of x x^T over the inputs of a layer for concept i.
        preserve_DD: C_p = sum of p p^T over the inputs that are kept.
        ridge: 0 gives the least-norm solution.
        preserve_scale: s.
        unit: of the ridge: m is the mean of the diagonal of the system without it, or as published 1.
    """
    own = [moment.double() for moment in moments]
    system_DD = torch.stack(own).sum(0) + preserve_scale * preserve_DD.double()
    size = float(system_DD.diagonal().mean()) if unit == "relative" else 1.0
    return [ridge_solve(system_DD, moment_DD, ridge=ridge * size).T for moment_DD in own]


class Read(NamedTuple):
    """Layers that read the same, and the moments of what they read: for each concept, and for what is kept."""

    layers: Sequence[str]
    own: Sequence[torch.Tensor]
    kept: torch.Tensor


def fuse(
    changes: Sequence[Mapping[str, Delta]],
    reads: Iterable[Read],
    *,
    ridge: float,
    preserve_scale: float,
    unit: RidgeUnit = "relative",
) -> list[Deltas]:
    """Each concept's share Delta_i K_i of one edit, with the least rank.

    Args:
        changes: Delta_i of each concept, in all layers of `reads`.
        reads: the layers; each group is one solve.
        ridge: see `fusion`.
        preserve_scale: see `fusion`.
        unit: see `fusion`.
    """
    shares: list[Deltas] = [{} for _ in changes]
    for layers, own, kept in reads:
        maps = fusion(own, kept, ridge=ridge, preserve_scale=preserve_scale, unit=unit)
        for share, change, k_DD in zip(shares, changes, maps, strict=True):
            share |= {layer: compress(_mapped(change[layer], k_DD)) for layer in layers}
    return shares


def _mapped(change: Delta, k_DD: torch.Tensor) -> Delta:
    """Delta K."""
    if isinstance(change, Dense):
        return Dense(change.weight.to(k_DD) @ k_DD)
    return LowRank(change.up.to(k_DD), change.down.to(k_DD) @ k_DD)
