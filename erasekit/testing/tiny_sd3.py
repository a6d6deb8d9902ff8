"""A tiny Stable Diffusion 3.5 pipeline, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from erasekit.backbones.memory import Holding
from erasekit.backbones.protocol import BackboneConfig
from erasekit.backbones.sd3 import StableDiffusion35Medium
from erasekit.testing import tiny, tiny_flux

PROJECTED = 24  # width of a CLIP's summary
TOKENS = 2 * tiny.WIDTH + 8  # width of T5: the two CLIPs side by side are narrower


class TinySD3(StableDiffusion35Medium):
    """A backbone for the tiny pipelines."""

    name: ClassVar[str] = "tiny-sd3"
    domain: ClassVar[Literal["natural", "mini"]] = "mini"
    sampling: ClassVar[dict[str, Any]] = {"sampler": "default"}
    on_cpu: ClassVar[Holding] = Holding(rows=64)
    size: ClassVar[int] = 16
    size_step: ClassVar[int] = 4
    positions: ClassVar[int] = tiny_flux.POSITIONS


def save_pipeline(folder: Path) -> Path:
    """Write a tiny SD3.5 folder (16 x 16 images, 8 x 8 latents, 4 x 4 patches) and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens, second, pieces = (
            tiny.tokenizer(folder / "tokenizer"),
            tiny.tokenizer(folder / "tokenizer_2"),
            tiny_flux.t5_tokenizer(),
        )
        second.pad_token = ","  # OpenCLIP does not pad with the end token either
        config = tiny.text_config(tokens)
        config.projection_dim = PROJECTED
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TOKENS,
            caption_projection_dim=32,
            pooled_projection_dim=2 * PROJECTED,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        pipe: Any = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_flux.flow_vae(1.5305, 0.0609),
            text_encoder=CLIPTextModelWithProjection(config),
            tokenizer=tokens,
            text_encoder_2=CLIPTextModelWithProjection(config),
            tokenizer_2=second,
            text_encoder_3=tiny_flux.t5_encoder(pieces, TOKENS),
            tokenizer_3=pieces,
        )
    pipe.save_pretrained(folder)
    return folder


def load(folder: Path, *, dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32") -> TinySD3:
    """The backbone of a tiny folder, on the CPU."""
    return TinySD3.load(BackboneConfig(path=str(folder), device="cpu", dtype=dtype))
