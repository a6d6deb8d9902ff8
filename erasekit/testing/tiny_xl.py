"""A tiny Stable Diffusion XL pipeline, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from erasekit.backbones.protocol import BackboneConfig
from erasekit.backbones.sdxl import StableDiffusionXL
from erasekit.testing import tiny


class TinyXL(StableDiffusionXL):
    """A backbone for the tiny pipelines."""

    name: ClassVar[str] = "tiny-xl"
    domain: ClassVar[Literal["natural", "mini"]] = "mini"
    sampling: ClassVar[dict[str, Any]] = {"guidance": 5.0, "size": 16}  # not SDXL's 1024 pixels


def save_pipeline(folder: Path) -> Path:
    """Write a tiny SDXL folder (16 x 16 images, 8 x 8 latents) and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens, second = tiny.tokenizer(folder / "tokenizer"), tiny.tokenizer(folder / "tokenizer_2")
        config = tiny.text_config(tokens)
        config.projection_dim = 24
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=2 * tiny.WIDTH,
            attention_head_dim=(2, 4),
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
        pipe: Any = StableDiffusionXLPipeline(
            vae=tiny.make_vae("kl"),
            text_encoder=CLIPTextModel(config),
            text_encoder_2=CLIPTextModelWithProjection(config),
            tokenizer=tokens,
            tokenizer_2=second,
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
            ),
        )
    pipe.save_pretrained(folder)
    return folder


def load(folder: Path) -> TinyXL:
    """The backbone of a tiny folder, on the CPU."""
    return TinyXL.load(BackboneConfig(path=str(folder), device="cpu", dtype="float32"))
