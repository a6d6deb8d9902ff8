"""The base model with an erasure merged into its weights: a diffusers folder, or one file in original names for SD1.x."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from erasekit.atomic import replacing
from erasekit.backbones.folders import HALF, part_config, tensor_files
from erasekit.erasures.deltas import Deltas, to_dense
from erasekit.erasures.exporting import Exported, Exporter, Order
from erasekit.erasures.kohya import SPEC, stamped
from erasekit.erasures.modelcard import merged_card
from erasekit.erasures.original import checkpoint
from erasekit.errors import ErasekitError, UsageError

TEXTS = (".json", ".txt", ".model", ".jinja")  # of a part, besides its tensors


class Merged(Exporter):
    """A model of its own: whoever loads it needs neither erasekit nor a LoRA. It is as large as the base."""

    def write(self, order: Order) -> Exported:
        """Write the folder, or one `.safetensors` file if `order.out` is called so.

        Raises:
            UsageError: the base is not a diffusers folder, or is none of which there are single files.
            EnvironmentProblem: the base cannot be loaded, or is another one.
        """
        if not hasattr(order.kind, "folder"):
            raise UsageError(f"'{order.kind.name}' is no diffusers folder that an erasure could be merged into.")
        order.backbone()
        base, deltas = order.kind.folder(order.config), order.deltas
        if order.out.suffix == ".safetensors":
            rounding = _file(order, base, deltas)
            return Exported(
                order.out, order.costs(rounding), f"Copy {order.out.name} to models/checkpoints or models/Stable-diffusion."
            )
        rounding = _folder(order, base, deltas)
        place = json.dumps(str(order.out), ensure_ascii=False)
        return Exported(order.out, order.costs(rounding), f"pipe = DiffusionPipeline.from_pretrained({place})")


def _folder(order: Order, base: Path, deltas: Deltas) -> float:
    """Write the folder, whole or not at all; what the type of the weights costs."""
    temporary = order.out.with_name(f".{order.out.name}.{os.getpid()}.tmp")
    index: dict[str, Any] = json.loads((base / "model_index.json").read_text("utf-8"))
    change = Change(deltas, order.dtype)
    try:
        for part in (name for name, value in index.items() if isinstance(value, list)):
            if (base / part).is_dir():
                _copy_part(base / part, temporary / part, change if part == order.erasure.prefix else None)
            else:  # one that erasekit has no use for and did not download
                index[part] = [None, None]
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        (temporary / "README.md").write_text(merged_card(order.record), "utf-8")
        change.check()
        temporary.rename(order.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return change.rounding


class Change:
    """Adds deltas to tensors as they come by, in float32 before the cast to the type that is written."""

    def __init__(self, deltas: Deltas, dtype: torch.dtype | None) -> None:
        """`dtype` of what is written, None for each tensor's own."""
        self._deltas, self._dtype = dict(deltas), dtype
        self._wrong = self._size = 0.0

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors with their deltas."""
        changed = {}
        for key, tensor in tensors.items():
            dtype = (self._dtype or tensor.dtype) if tensor.is_floating_point() else tensor.dtype
            delta = self._deltas.pop(key.removesuffix(".weight"), None) if key.endswith(".weight") else None
            if delta is not None:
                edit = to_dense(delta).float()
                exact = tensor.float() + edit.reshape(tensor.shape)
                changed[key] = exact.to(dtype)
                self._wrong += float((changed[key].double() - exact.double()).square().sum())
                self._size += float(edit.double().square().sum())
            else:
                changed[key] = tensor.to(dtype)
        return changed

    def check(self) -> None:
        """See that every delta found its tensor.

        Raises:
            ErasekitError: one did not.
        """
        if self._deltas:
            raise ErasekitError(f"The base has no layer '{next(iter(self._deltas))}'. Was the erasure made for another one?")

    @property
    def rounding(self) -> float:
        """What the type costs: |written - exact| / |Delta|."""
        return float((self._wrong / self._size) ** 0.5) if self._size else 0.0


def _copy_part(source: Path, target: Path, change: Change | None) -> None:
    """Copy a part of a pipeline, its tensors under the names that a plain `from_pretrained` looks for."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in TEXTS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    try:
        files, _ = tensor_files(source)
    except FileNotFoundError:  # a tokenizer, a scheduler
        return
    for file in dict.fromkeys(files.values()):
        if change is None:
            shutil.copyfile(file, target / _plain(file))
        else:
            save_file(change(load_file(file)), target / _plain(file), metadata={"format": "pt"})
    if len(set(files.values())) > 1:
        total = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        weights = {"metadata": {"total_size": total}, "weight_map": {key: _plain(file) for key, file in files.items()}}
        stem = _plain(next(iter(files.values()))).partition("-")[0]
        (target / f"{stem}.safetensors.index.json").write_text(json.dumps(weights, indent=2) + "\n", "utf-8")


def _plain(file: Path) -> str:
    """The name of a file of tensors without its variant."""
    return file.name.replace(f".{HALF}", "")


def _file(order: Order, base: Path, deltas: Deltas) -> float:
    """Write a Stable Diffusion 1.x as one file; what the type of the weights costs."""
    if order.erasure.prefix != "unet":
        raise UsageError("Only Stable Diffusion 1.x is written as one file. Give --out a folder, without an ending.")
    vae = part_config(base, "vae")
    if vae["_class_name"] != "AutoencoderKL":
        kind = vae["_class_name"]
        raise UsageError(f"One file holds an AutoencoderKL, this model has an {kind}. Give --out a folder, without an ending.")
    change, parts = Change(deltas, order.dtype), {}
    for part in ("unet", "vae", "text_encoder"):
        files = dict.fromkeys(tensor_files(base / part)[0].values())
        tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
        parts[part] = change(tensors) if part == "unet" else Change({}, order.dtype)(tensors)
    change.check()
    named = checkpoint(parts, layers=part_config(base, "unet")["layers_per_block"], levels=len(vae["block_out_channels"]))
    concepts = ", ".join(c.name for c in order.erasure.concepts)
    entries = {
        f"{SPEC}sai_model_spec": "1.0.1",
        f"{SPEC}architecture": "stable-diffusion-v1",
        f"{SPEC}implementation": "https://github.com/Stability-AI/generative-models",
        f"{SPEC}title": f"{order.record['base']['repo']} without {concepts}",
        f"{SPEC}description": f"{concepts} erased with {order.record['method']} (erasekit).",
        f"{SPEC}resolution": "512x512",
        f"{SPEC}date": order.record["created"][:10],
        f"{SPEC}merged_from": order.record["base"]["repo"],
        f"{SPEC}prediction_type": "epsilon",
    }
    with replacing(order.out) as temporary:
        temporary.write_bytes(stamped({k: t.contiguous() for k, t in named.items()}, entries, lora=False))
    return change.rounding
