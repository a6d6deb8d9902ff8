"""LoRA files as kohya's sd-scripts write them, which ComfyUI, Forge and A1111 read.

Keys are `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha`, the layer's path with `_` for `.`; the delta of a
layer is alpha / rank * up @ down. Stable Diffusion 1.x has diffusers' paths. FLUX.1 has those of the original code, where
queries, keys and values (in single blocks the MLP's first layer too) are one layer: their factors are laid in blocks.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from typing import NamedTuple

import torch
from safetensors.torch import save

from erasekit.atomic import replacing
from erasekit.erasures.deltas import LowRank, distance
from erasekit.erasures.exporting import Exported, Exporter, Order
from erasekit.erasures.tensors import rounded
from erasekit.errors import UsageError

STABLE_DIFFUSION = r"((down|up)_blocks|mid_block|time_embedding|conv_in|conv_out)[._]"
SPEC = "modelspec."
MLP = 4  # FLUX's MLP is so many times as wide as the model


class Place(NamedTuple):
    """Where the original code of FLUX.1 has a layer of diffusers.

    Attributes:
        name: the original layer.
        part: which of the layers that lie in it, one below the other.
        of: how many those are.
        swapped: its halves (scale and shift) are the other way round.
    """

    name: str
    part: int = 0
    of: int = 1
    swapped: bool = False


# {pattern of the path in diffusers: place, with the number of the block}.
FLUX: Mapping[str, Place] = {
    r"transformer_blocks\.(\d+)\.attn\.to_q": Place("double_blocks_{}_img_attn_qkv", 0, 3),
    r"transformer_blocks\.(\d+)\.attn\.to_k": Place("double_blocks_{}_img_attn_qkv", 1, 3),
    r"transformer_blocks\.(\d+)\.attn\.to_v": Place("double_blocks_{}_img_attn_qkv", 2, 3),
    r"transformer_blocks\.(\d+)\.attn\.add_q_proj": Place("double_blocks_{}_txt_attn_qkv", 0, 3),
    r"transformer_blocks\.(\d+)\.attn\.add_k_proj": Place("double_blocks_{}_txt_attn_qkv", 1, 3),
    r"transformer_blocks\.(\d+)\.attn\.add_v_proj": Place("double_blocks_{}_txt_attn_qkv", 2, 3),
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": Place("double_blocks_{}_img_attn_proj"),
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": Place("double_blocks_{}_txt_attn_proj"),
    r"transformer_blocks\.(\d+)\.norm1\.linear": Place("double_blocks_{}_img_mod_lin"),
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": Place("double_blocks_{}_txt_mod_lin"),
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": Place("double_blocks_{}_img_mlp_0"),
    r"transformer_blocks\.(\d+)\.ff\.net\.2": Place("double_blocks_{}_img_mlp_2"),
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": Place("double_blocks_{}_txt_mlp_0"),
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2": Place("double_blocks_{}_txt_mlp_2"),
    r"single_transformer_blocks\.(\d+)\.attn\.to_q": Place("single_blocks_{}_linear1", 0, 4),
    r"single_transformer_blocks\.(\d+)\.attn\.to_k": Place("single_blocks_{}_linear1", 1, 4),
    r"single_transformer_blocks\.(\d+)\.attn\.to_v": Place("single_blocks_{}_linear1", 2, 4),
    r"single_transformer_blocks\.(\d+)\.proj_mlp": Place("single_blocks_{}_linear1", 3, 4),
    r"single_transformer_blocks\.(\d+)\.proj_out": Place("single_blocks_{}_linear2"),
    r"single_transformer_blocks\.(\d+)\.norm\.linear": Place("single_blocks_{}_modulation_lin"),
    r"x_embedder": Place("img_in"),
    r"context_embedder": Place("txt_in"),
    r"time_text_embed\.timestep_embedder\.linear_1": Place("time_in_in_layer"),
    r"time_text_embed\.timestep_embedder\.linear_2": Place("time_in_out_layer"),
    r"time_text_embed\.text_embedder\.linear_1": Place("vector_in_in_layer"),
    r"time_text_embed\.text_embedder\.linear_2": Place("vector_in_out_layer"),
    r"time_text_embed\.guidance_embedder\.linear_1": Place("guidance_in_in_layer"),
    r"time_text_embed\.guidance_embedder\.linear_2": Place("guidance_in_out_layer"),
    r"norm_out\.linear": Place("final_layer_adaLN_modulation_1", swapped=True),
    r"proj_out": Place("final_layer_linear"),
}


class Kohya(Exporter):
    """One `.safetensors` file with kohya's keys."""

    suffix = ".safetensors"

    def write(self, order: Order) -> Exported:
        """Write the file.

        Raises:
            UsageError: the model has no names there, or a layer has none.
        """
        architecture = getattr(order.kind, "architecture", ("",))[0]
        if architecture not in ("", "UNet2DConditionModel", "FluxTransformer2DModel"):
            line = f"kohya's files are written for Stable Diffusion 1.x and FLUX.1, and '{order.kind.name}' is neither"
            raise UsageError(f"{line}. Use --to diffusers, or --to merged for a model of its own.")
        low, alpha = with_one_alpha(named(rounded(order.deltas, order.dtype or torch.float32)[0], order.erasure.prefix))
        meant = {name: LowRank(d.up.double() * (alpha / d.rank), d.down.double()) for name, d in low.items()}
        exact = order.dtype in (None, torch.float32)
        rounding = 0.0 if exact else distance(meant, named(rounded(order.deltas, torch.float32)[0], order.erasure.prefix))
        tensors: dict[str, torch.Tensor] = {}
        for name, delta in low.items():
            own = torch.tensor(float(alpha))  # not in the file's type: bfloat16 has no odd numbers above 256
            tensors |= {f"{name}.alpha": own, f"{name}.lora_down.weight": delta.down, f"{name}.lora_up.weight": delta.up}
        out = order.out
        with replacing(out) as temporary:
            temporary.write_bytes(stamped(tensors, metadata(order, out.stem, {d.rank for d in low.values()})))
        unet = order.erasure.prefix == "unet"
        where = f"models/loras (ComfyUI) or models/Lora ({'A1111, Forge' if unet else 'Forge; A1111 has no FLUX.1'})"
        advice = f"Copy {out.name} to {where}. Strength 1 is the erasure as it was measured."
        if not unet:  # seen in diffusers 0.42, which drops the layers outside of the blocks
            advice += " diffusers does not read all of this file: for it, export --to diffusers."
        return Exported(out, order.costs(rounding), advice)


def with_one_alpha(layers: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], int]:
    """Factors for alpha / rank * up @ down, with one alpha for all layers, whatever their ranks are; and that alpha.

    Where alphas differ, diffusers (0.42) loads kohya's attention layers with the commonest one.
    """
    alpha = max(delta.rank for delta in layers.values())
    return {name: LowRank((d.up.double() * (d.rank / alpha)).to(d.up.dtype), d.down) for name, d in layers.items()}, alpha


def named(deltas: Mapping[str, LowRank], prefix: str) -> dict[str, LowRank]:
    """The deltas under kohya's names for their layers.

    Args:
        deltas: by their paths in diffusers.
        prefix: of the denoiser: `unet` of Stable Diffusion 1.x, `transformer` of FLUX.1.

    Raises:
        UsageError: a layer has no name there.
    """
    if prefix == "unet":
        unnamed = [module for module in deltas if not re.match(STABLE_DIFFUSION, module)]
        _refuse(unnamed, "Stable Diffusion 1.x")
        return {f"lora_unet_{module.replace('.', '_')}": delta for module, delta in deltas.items()}
    groups: dict[tuple[str, int], dict[int, LowRank]] = {}
    for module, delta in deltas.items():
        pattern = next((p for p in FLUX if re.fullmatch(p, module)), None)
        if pattern is None:
            _refuse([module], "FLUX.1")
            continue
        place, found = FLUX[pattern], re.fullmatch(pattern, module)
        name = place.name.format(*(found.groups() if found else ()))
        groups.setdefault((f"lora_unet_{name}", place.of), {})[place.part] = _swapped(delta) if place.swapped else delta
    return {name: _stacked(parts, of) for (name, of), parts in groups.items()}


def _refuse(modules: list[str], family: str) -> None:
    if modules:
        raise UsageError(f"kohya's files have no name for '{modules[0]}': it is no layer of {family}. Use --to diffusers.")


def _swapped(delta: LowRank) -> LowRank:
    """The delta with the halves of its output changed over."""
    first, second = delta.up.chunk(2)
    return LowRank(torch.cat([second, first]), delta.down)


def _stacked(parts: Mapping[int, LowRank], of: int) -> LowRank:
    """The delta of a layer that several lie in, one below the other; those that have no delta are zero.

    Queries, keys and values are as wide as the model, and the MLP `MLP` times as wide.
    """
    if of == 1:
        return parts[0]
    width = next(iter(parts.values())).down.shape[1]
    rows = [width] * 3 + [MLP * width] * (of - 3)
    ups, downs = [], []
    for part, delta in sorted(parts.items()):
        up = delta.up.new_zeros(sum(rows), delta.rank)
        up[sum(rows[:part]) : sum(rows[: part + 1])] = delta.up
        ups.append(up)
        downs.append(delta.down)
    return LowRank(torch.cat(ups, 1), torch.cat(downs))


def metadata(order: Order, name: str, ranks: set[int]) -> dict[str, str]:
    """What the programs that read these files show and sort by: ModelSpec 1.0.1, and the trainer's own `ss_` keys."""
    flux, record = order.erasure.prefix == "transformer", order.record
    concepts = ", ".join(c.name for c in order.erasure.concepts)
    rank = str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"
    kind = ("flux-1-schnell" if "schnell" in order.kind.name else "flux-1-dev") if flux else "stable-diffusion-v1"
    implementation = "https://github.com/black-forest-labs/flux" if flux else "diffusers"
    side = order.kind.sampling.get("size", 512)
    return {
        f"{SPEC}sai_model_spec": "1.0.1",
        f"{SPEC}architecture": f"{kind}/lora",
        f"{SPEC}implementation": implementation,
        f"{SPEC}title": f"{concepts} erased",
        f"{SPEC}description": f"Takes {concepts} out of {record['base']['repo']} (erasekit, method {record['method']}).",
        f"{SPEC}resolution": f"{side}x{side}",
        f"{SPEC}date": record["created"][:10],
        f"{SPEC}tags": "concept erasure",
        f"{SPEC}usage_hint": "strength 1 is the erasure as it was measured; needs no words in the prompt",
        **({} if flux else {f"{SPEC}prediction_type": "epsilon"}),
        "ss_network_module": "networks.lora_flux" if flux else "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": str(max(ranks)),
        "ss_base_model_version": "flux1" if flux else "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": record["base"]["repo"],
        "ss_output_name": name,
        "ss_training_comment": f"erasekit {record['method']} {record['config_hash']}, erasure {record['erasure_sha256'][:8]}",
    }


def stamped(tensors: Mapping[str, torch.Tensor], entries: Mapping[str, str], *, lora: bool = True) -> bytes:
    """A safetensors file whose metadata are in order, so that equal tensors give equal bytes, with the hash of its tensors.

    safetensors itself writes metadata in random order.
    """
    plain = save(dict(tensors))
    length = struct.unpack("<Q", plain[:8])[0]
    header, content = json.loads(plain[8 : 8 + length]), plain[8 + length :]
    sha256 = hashlib.sha256(content).hexdigest()
    hashes = {f"{SPEC}hash_sha256": f"0x{sha256}"} | ({"sshs_model_hash": sha256} if lora else {})
    header = {"__metadata__": dict(sorted((dict(entries) | hashes).items()))} | header
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content
