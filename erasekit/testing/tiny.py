"""Tiny real pipelines, made on the spot: the diffusers classes of Stable Diffusion with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erasekit.backbones.protocol import BackboneConfig
from erasekit.backbones.sd import StableDiffusion

WORDS = ("a", "photo", "of", "cat", "dog", "kitten", "ship", "thing", "red", "by", "vint", "in", "the", "style")
LENGTH = 16
WIDTH = 32


class TinySD(StableDiffusion):
    """A backbone for the tiny pipelines."""

    name: ClassVar[str] = "tiny"
    domain: ClassVar[Literal["natural", "mini"]] = "mini"


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows `WORDS` as whole tokens and spells everything else in letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary, merges = [*letters, *(c + "</w>" for c in letters), ",", ",</w>"], []
    for word in WORDS:
        left = word[0] if len(word) > 1 else word
        for i in range(1, len(word)):
            right = word[i] + ("</w>" if i == len(word) - 1 else "")
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                vocabulary.append(left + right)
            left += right
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tokens: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    return tokens


def make_vae(kind: str) -> Any:
    """An autoencoder of `kl` or `tiny` form for images of 16 pixels."""
    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )


def text_config(tokens: CLIPTokenizer) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder of two layers for the tokenizer's words."""
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def save_pipeline(folder: Path, *, vae: Literal["kl", "tiny"] = "tiny", seed: int = 0) -> Path:
    """Write a tiny Stable Diffusion folder (16 x 16 images, 8 x 8 latents) and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = tokenizer(folder / "tokenizer")
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        pipe: Any = StableDiffusionPipeline(
            vae=make_vae(vae),
            text_encoder=CLIPTextModel(text_config(tokens)),
            tokenizer=tokens,
            unet=unet,
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                timestep_spacing="trailing",
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def load(folder: Path, *, dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32") -> TinySD:
    """The backbone of a tiny folder, on the CPU."""
    return TinySD.load(BackboneConfig(path=str(folder), device="cpu", dtype=dtype))
