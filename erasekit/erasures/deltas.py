"""Weight deltas: what an erasure adds to the linear layers of a denoiser, as low-rank factors or as a full matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from erasekit.errors import ErasekitError


@dataclass(frozen=True, eq=False)
class LowRank:
    """The delta `up @ down`.

    Attributes:
        up: (out, rank).
        down: (rank, in).
    """

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        """The number of columns of `up`."""
        return self.up.shape[1]


@dataclass(frozen=True, eq=False)
class Dense:
    """A delta that is no product of small factors.

    Attributes:
        weight: (out, in).
    """

    weight: torch.Tensor


Delta = LowRank | Dense
Deltas = dict[str, Delta]  # path of the module in the denoiser -> its delta


def to_dense(delta: Delta) -> torch.Tensor:
    """The full matrix (out, in), in the factors' own type."""
    return delta.weight if isinstance(delta, Dense) else delta.up @ delta.down


def shape(delta: Delta) -> tuple[int, int]:
    """The shape (out, in) of the full matrix."""
    if isinstance(delta, Dense):
        return delta.weight.shape[0], delta.weight.shape[1]
    return delta.up.shape[0], delta.down.shape[1]


def add(first: Delta, second: Delta) -> Delta:
    """The sum: two low-rank deltas are concatenated by rank, anything else is added up."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return LowRank(torch.cat([first.up, second.up], 1), torch.cat([first.down, second.down]))
    return Dense(to_dense(first) + to_dense(second))


def summed(parts: Sequence[Deltas]) -> Deltas:
    """The sum of several sets of deltas; modules keep the order in which they come up."""
    total: Deltas = {}
    for part in parts:
        for name, delta in part.items():
            total[name] = add(total[name], delta) if name in total else delta
    return total


def scale(deltas: Deltas, factor: float) -> Deltas:
    """Every delta times `factor`."""
    return {
        name: LowRank(d.up * factor, d.down) if isinstance(d, LowRank) else Dense(d.weight * factor)
        for name, d in deltas.items()
    }


def compress(delta: Delta, *, tolerance: float = 1e-7, rank: int | None = None) -> LowRank:
    """The delta with the least rank: singular values below `tolerance` times the largest one are dropped.

    With `rank` at most so many are kept: the nearest matrix of that rank (Eckart and Young 1936).

    The factors are balanced (both carry the root of the singular values), and the rank is at least one. Computed in
    float64 from thin QR factors, so a low-rank delta is never multiplied out.
    """
    if isinstance(delta, Dense):
        u_OR, s_R, vh_RI = torch.linalg.svd(delta.weight.double(), full_matrices=False)
    else:
        q_OR, r_up = torch.linalg.qr(delta.up.double())
        q_IR, r_down = torch.linalg.qr(delta.down.double().T)
        u, s_R, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        u_OR, vh_RI = q_OR @ u, vh @ q_IR.T
    rank = max(1, min(int((s_R > tolerance * s_R[0]).sum()), rank or len(s_R)))
    root_R = s_R[:rank].sqrt()
    dtype = delta.weight.dtype if isinstance(delta, Dense) else delta.up.dtype
    return LowRank((u_OR[:, :rank] * root_R).to(dtype), (root_R[:, None] * vh_RI[:rank]).to(dtype))


def reduced(deltas: Deltas, rank: int) -> tuple[Deltas, float]:
    """The deltas with at most so many ranks each, and what that costs: |reduced - Delta| / |Delta| over all layers."""
    low: Deltas = {name: compress(delta, rank=rank) for name, delta in deltas.items()}
    return low, distance(low, deltas)


def distance(near: Mapping[str, Delta], exact: Mapping[str, Delta]) -> float:
    """|near - exact| / |exact| over all layers, in float64; 0 where there is nothing."""
    wrong = sum(norm(add(_double(near[name], 1.0), _double(delta, -1.0))) ** 2 for name, delta in exact.items())
    size = sum(norm(delta) ** 2 for delta in exact.values())
    return float((wrong / size) ** 0.5) if size else 0.0


def _double(delta: Delta, factor: float) -> Delta:
    """A delta times a factor, in float64 on the CPU."""
    if isinstance(delta, Dense):
        return Dense(delta.weight.double().cpu() * factor)
    return LowRank(delta.up.double().cpu() * factor, delta.down.double().cpu())


def norm(delta: Delta) -> float:
    """The Frobenius norm, in float64; a low-rank delta is not multiplied out."""
    if isinstance(delta, Dense):
        return float(delta.weight.double().norm())
    r_up = torch.linalg.qr(delta.up.double(), mode="r").R
    r_down = torch.linalg.qr(delta.down.double().T, mode="r").R
    return float((r_up @ r_down.T).norm())


def merge_(denoiser: nn.Module, deltas: Deltas) -> None:
    """Add the deltas to the denoiser's weights in place, in float32 before the cast to the weights' own type.

    Raises:
        ErasekitError: a module is missing, has another shape, or holds its weight in four bits; nothing is changed then.
    """
    layers = check_layers(denoiser, deltas)
    packed = next((name for name, layer in layers.items() if _packed(layer)), None)
    if packed is not None:
        raise ErasekitError(f"'{packed}' holds its weight in four bits: nothing can be merged into it. Load it in 16 bits.")
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = layers[name].weight
            weight.copy_(weight.float() + to_dense(delta).to(weight.device, torch.float32))


@contextmanager
def merged(denoiser: nn.Module, deltas: Deltas) -> Iterator[None]:
    """The denoiser with the deltas merged; the exact bits of the original weights come back at the end.

    The originals wait on the CPU: those of all attention layers of FLUX.1 are 5 GB. A layer that holds its weight in four
    bits has its delta added to what it gives instead.

    Raises:
        ErasekitError: a module is missing or has another shape.
    """
    layers = check_layers(denoiser, deltas)
    whole = {name: delta for name, delta in deltas.items() if not _packed(layers[name])}
    originals = {name: layers[name].weight.detach().to("cpu", copy=True) for name in whole}
    hooks = [layers[name].register_forward_hook(_beside(deltas[name])) for name in deltas.keys() - whole.keys()]
    merge_(denoiser, whole)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, original in originals.items():
                layers[name].weight.copy_(original)


def _packed(layer: Any) -> bool:
    """Whether a layer holds its weight in four bits, as bitsandbytes does: integers in a shape of their own."""
    return not layer.weight.is_floating_point()


def _beside(delta: Delta) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    """A hook that adds a delta to what a layer gives, in float32."""
    factors = [delta.weight] if isinstance(delta, Dense) else [delta.down, delta.up]

    def hook(layer: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
        change = given[0].float()
        for factor in factors:
            change = nn.functional.linear(change, factor.to(change))
        changed: torch.Tensor = out + change.to(out)
        return changed

    return hook


def check_layers(denoiser: nn.Module, deltas: Deltas) -> dict[str, Any]:
    """The linear layer that each delta belongs to, its shape checked.

    Raises:
        ErasekitError: a module is missing or has another shape.
    """
    modules = dict(denoiser.named_modules())
    layers: dict[str, Any] = {}
    for name, delta in deltas.items():
        layer: Any = modules.get(name)
        there = _shape(layer)
        if there != shape(delta):
            have = f"is {there} there" if there else "is not there"
            raise ErasekitError(f"The delta of '{name}' is {shape(delta)}, the module {have}. Was it made for another base?")
        layers[name] = layer
    return layers


def _shape(layer: Any) -> tuple[int, ...]:
    """The shape of a layer's weight (out, in), as it is when it is not packed; () if it has none."""
    layer = getattr(layer, "base_layer", layer)  # an adapter lies around it
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return ()
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(weight.shape)
