"""What a method hands over, checked before an erasure is made of it: no mistake of an author is left for diffusers to find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from erasekit.backbones.protocol import Backbone
from erasekit.erasures.deltas import Delta, Dense, LowRank, shape
from erasekit.errors import ErasekitError, nearest

LEVELS = "{concept: {part: {layer: delta}}}"


def check_deltas(method: str, deltas: Any, backbone: Backbone) -> None:
    """Refuse deltas that are not there, lack a level, do not fit the base's layers, or are not finite.

    Args:
        method: its name, for the error.
        deltas: what it gives.
        backbone: whose layers they belong to.

    Raises:
        ErasekitError: one line with the method, the concept and part, and the layer.
    """
    leaves = list(_leaves(method, deltas))
    if not leaves:
        raise ErasekitError(f"Method '{method}' changes nothing: it gives no delta of any layer.")
    for where, layer, delta in leaves:
        line = f"Method '{method}': the delta of '{layer}' in {where}"
        if not isinstance(delta, LowRank | Dense):
            raise ErasekitError(f"{line} is {_kind(delta)}. Give a LowRank(up, down) or a Dense(weight).")
        _check_factors(line, delta)
        there = _shape_there(line, layer, backbone)
        if there is not None and shape(delta) != there:
            raise ErasekitError(f"{line} is {shape(delta)}, the layer (out, in) = {there}.")


def _leaves(method: str, deltas: Any) -> Iterator[tuple[str, Any, Any]]:
    """(concept and part, layer, delta) of all deltas."""
    for concept, parts in _level(method, "deltas", deltas, "{part: {layer: delta}}"):
        for part, layers in _level(method, f"'{concept}'", parts, "{layer: delta}"):
            for layer, delta in _level(method, f"'{concept}'/'{part}'", layers, "deltas"):
                yield f"'{concept}'/'{part}'", layer, delta


def _level(method: str, where: str, found: Any, inside: str) -> Iterator[tuple[Any, Any]]:
    """The entries of one level."""
    if not isinstance(found, Mapping):
        line = f"Method '{method}': {where} is {_kind(found)}, where a dictionary of {inside} belongs"
        raise ErasekitError(f"{line}. Deltas have three levels: {LEVELS}.")
    yield from found.items()


def _check_factors(line: str, delta: Delta) -> None:
    """See that a delta's tensors are finite matrices that belong together."""
    factors = {"weight": delta.weight} if isinstance(delta, Dense) else {"up": delta.up, "down": delta.down}
    for name, factor in factors.items():
        if not isinstance(factor, torch.Tensor) or not factor.is_floating_point() or factor.dim() != 2:
            raise ErasekitError(f"{line} has {_kind(factor)} as '{name}'. Give a matrix of floating-point numbers.")
        if not bool(factor.isfinite().all()):
            raise ErasekitError(f"{line} holds numbers in '{name}' that are not finite.")
    if isinstance(delta, LowRank) and delta.up.shape[1] != delta.down.shape[0]:
        up, down = tuple(delta.up.shape), tuple(delta.down.shape)
        raise ErasekitError(f"{line} has 'up' {up} and 'down' {down}. They are (out, rank) and (rank, in).")


def _shape_there(line: str, layer: Any, backbone: Backbone) -> tuple[int, ...] | None:
    """The shape of a layer's weight; None of one in four bits, which has it no more.

    Raises:
        ErasekitError: the base has no such layer.
    """
    try:
        weight = backbone.weight(layer)
    except (KeyError, AttributeError, TypeError) as error:
        near = nearest(str(layer), [*(site.name for site in backbone.text_sites()), *backbone.lora_targets("all")])
        raise ErasekitError(f"{line}: '{backbone.name}' has no such linear layer.{near}") from error
    return tuple(weight.shape) if weight.is_floating_point() else None


def _kind(value: Any) -> str:
    """What something is, in a word or two."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
