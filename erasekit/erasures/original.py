"""The names that the original code of Stable Diffusion 1.x gives to tensors, and to a whole pipeline in one file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# Of the VAE's one attention; diffusers has had two sets of names for it, and files of both are about.
ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def unet_name(name: str, layers: int) -> str:
    """The name of a tensor or module of a UNet with `layers` layers in a block; "" for what the original has not.

    Blocks lie in one row: an input block for each resnet and each downsampler, likewise output blocks. A level without
    attention has its upsampler in the place of the attention.
    """
    for ours, theirs in OUTER.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if ".resnets." in name:
        name = re.sub(r"(\.resnets\.\d+\.)(\w+)", lambda m: m[1] + RESNET.get(m[2], m[2]), name)
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        return f"middle_block.{2 * int(found[2]) + (found[1] == 'attentions')}.{found[3]}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if not found:
        return ""
    side, block, kind, k, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if side == "down":
        index = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else k)
        place = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
        return f"input_blocks.{index}.{place}.{rest.removeprefix('conv.') if kind == 'downsamplers' else rest}"
    index = block * (layers + 1) + (layers if kind == "upsamplers" else k)
    place = {"resnets": "0", "attentions": "1", "upsamplers": "1" if block == 0 else "2"}[kind]
    return f"output_blocks.{index}.{place}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """The name of a tensor of an `AutoencoderKL` with `blocks` levels; those of the decoder are counted the other way."""
    if ".mid_block.attentions." in name:
        name = re.sub(r"(attentions\.\d+\.)(to_out\.0|\w+)", lambda m: m[1] + ATTENTION[m[2]], name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    return name.replace("conv_shortcut", "nin_shortcut")


def checkpoint(parts: Mapping[str, Mapping[str, torch.Tensor]], *, layers: int, levels: int) -> dict[str, torch.Tensor]:
    """The tensors of a pipeline under their original names.

    Args:
        parts: of `unet`, `vae` and `text_encoder`, by their names in diffusers.
        layers: `layers_per_block` of the UNet.
        levels: how many levels the VAE has.
    """
    named: dict[str, Callable[[str], str]] = {
        "unet": lambda name: UNET + unet_name(name, layers),
        "vae": lambda name: VAE + vae_name(name, levels),
        "text_encoder": lambda name: f"{TEXT}text_model.{name.removeprefix('text_model.')}",
    }
    tensors = {named[part](name): t for part, of in parts.items() for name, t in of.items()}
    # The original VAE has 1 x 1 convolutions where diffusers has linear layers.
    return {
        k: t[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", k) and t.ndim == 2 else t
        for k, t in tensors.items()
    }
