"""Deltas as LoRA files that plain diffusers loads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from erasekit.erasures.deltas import Deltas, Dense, LowRank, compress, distance
from erasekit.errors import ErasekitError, unknown

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LORA_KEYS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}


@dataclass(frozen=True)
class Written:
    """What a file holds.

    Attributes:
        sha256: of its bytes.
        rank: the largest of its layers.
        rounding: what its type costs, |rounded - Delta| / |Delta| over all layers; 0 in float32.
    """

    sha256: str
    rank: int
    rounding: float


def dtype_of(name: str) -> torch.dtype:
    """A type that files are written in, by name.

    Raises:
        UsageError: there is no such type.
    """
    if name not in DTYPES:
        raise unknown("type of tensors", name, DTYPES, "docs/reference.md")
    return DTYPES[name]


def write(path: Path, deltas: Deltas, prefix: str, dtype: torch.dtype = torch.float32) -> Written:
    """Write what diffusers' `save_lora_weights` does: PEFT keys with the pipeline's prefix, scale baked into B.

    Raises:
        ErasekitError: there are no deltas, or values that are not finite.
    """
    low, rounding = rounded(deltas, dtype)
    tensors: dict[str, torch.Tensor] = {}
    for module, delta in low.items():
        tensors |= {f"{prefix}.{module}.lora_A.weight": delta.down, f"{prefix}.{module}.lora_B.weight": delta.up}
    if not tensors or not all(t.isfinite().all() for t in tensors.values()):
        raise ErasekitError(
            f"The erasure '{path.stem}' {'holds values that are not finite' if tensors else 'changes nothing'}."
        )
    path.parent.mkdir(exist_ok=True)
    # One entry only: safetensors writes several in random order, and the same erasure has to give the same bytes.
    save_file(tensors, path, metadata={"lora_adapter_metadata": _lora_config(tensors, prefix)})
    return Written(hashlib.sha256(path.read_bytes()).hexdigest(), max(delta.rank for delta in low.values()), rounding)


def rounded(deltas: Deltas, dtype: torch.dtype) -> tuple[dict[str, LowRank], float]:
    """The deltas as factors in a type, on the CPU, and what the type costs: |rounded - Delta| / |Delta|, 0 in float32.

    Every tensor has memory of its own: a method may use one matrix at several sites, and safetensors refuses shared memory.
    """
    exact = {module: _low_rank(delta) for module, delta in deltas.items()}
    if dtype != torch.float32:
        exact = {module: _balanced(delta) for module, delta in exact.items()}
    low = {module: LowRank(_own(delta.up, dtype), _own(delta.down, dtype)) for module, delta in exact.items()}
    return low, 0.0 if dtype == torch.float32 else distance(low, exact)


def _own(side: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return side.detach().to("cpu", dtype).contiguous().clone()


def read(path: Path, prefix: str, dtype: torch.dtype = torch.float32) -> dict[str, LowRank]:
    """The deltas in a file that `write` wrote, in float32 whatever the file's type is.

    Args:
        path: the file.
        prefix: the denoiser's name in the pipeline.
        dtype: the type that the tensors have in the file.

    Raises:
        ValueError: the file holds anything that `write` does not write: tensors of another kind, shape or type or that are
            not finite, a layer in part, or settings that would load them at another scale.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors file ({error})") from error
    halves = {re.fullmatch(rf"{re.escape(prefix)}\.(.+)\.lora_([AB])\.weight", key): t for key, t in tensors.items()}
    if not tensors or None in halves:
        raise ValueError("it holds something else than LoRA weights of the denoiser, or nothing")
    sides = {(found[1], found[2]): tensor for found, tensor in halves.items() if found}
    deltas: dict[str, LowRank] = {}
    for module in dict.fromkeys(module for module, _ in sides):
        down, up = sides.get((module, "A")), sides.get((module, "B"))
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or not len(down) == up.shape[1] > 0:
            raise ValueError(f"the two factors of '{module}' do not belong together")
        if down.dtype != dtype or up.dtype != dtype:
            raise ValueError(f"'{module}' is {down.dtype}, not {dtype}")
        if len(down) > min(len(up), down.shape[1]):
            raise ValueError(f"'{module}' has a larger rank than its layer")
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"'{module}' holds values that are not finite")
        deltas[module] = LowRank(up=up.float(), down=down.float())
    _check_header(header, {module: low.rank for module, low in deltas.items()}, prefix)
    return deltas


def _check_header(header: Mapping[str, str], ranks: Mapping[str, int], prefix: str) -> None:
    """See that diffusers will load every layer at its own rank and at scale one.

    Raises:
        ValueError: it will not.
    """
    try:
        config = {k.removeprefix(f"{prefix}."): v for k, v in json.loads(header["lora_adapter_metadata"]).items()}
        rank, pattern = config["r"], config["rank_pattern"]
        whole = header.keys() == {"lora_adapter_metadata"} and config.keys() == LORA_KEYS
        same = config["lora_alpha"] == rank and config["alpha_pattern"] == pattern
        own = {module: pattern.get(f"^{re.escape(module)}", rank) for module in ranks}
        named = sorted(config["target_modules"]) == sorted(ranks) and pattern.keys() <= {f"^{re.escape(m)}" for m in ranks}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its head has no settings of a LoRA ({type(error).__name__})") from error
    if not (whole and same and named and own == ranks):
        raise ValueError("the LoRA settings in its head are not those of its tensors, and would load them at another scale")


def _low_rank(delta: Dense | LowRank) -> LowRank:
    """The delta as factors that are no larger than it is."""
    full = isinstance(delta, LowRank) and delta.rank > min(delta.up.shape[0], delta.down.shape[1])
    return compress(delta) if isinstance(delta, Dense) or full else delta


def _balanced(low: LowRank) -> LowRank:
    """The same delta, each column of `up` as long as its row of `down`: half precision has no room for very small values."""
    up_R, down_R = low.up.norm(dim=0), low.down.norm(dim=1)
    scale_R = (down_R / up_R.clamp_min(torch.finfo(up_R.dtype).tiny)).sqrt().clamp_min(1e-12)
    return LowRank(low.up * scale_R, low.down / scale_R[:, None])


def _lora_config(tensors: Mapping[str, torch.Tensor], prefix: str) -> str:
    """The header in which diffusers looks for a LoRA's settings.

    Without it, older diffusers (seen: 0.39) scales layers of other than the commonest rank by a wrong alpha.
    """
    ranks = {k.removesuffix(".lora_A.weight").removeprefix(f"{prefix}."): len(t) for k, t in tensors.items() if ".lora_A." in k}
    rank = next(iter(ranks.values()))
    pattern = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    config = {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern, "target_modules": list(ranks)}
    return json.dumps({f"{prefix}.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
