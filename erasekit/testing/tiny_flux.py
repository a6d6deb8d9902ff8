"""Tiny real pipelines of the diffusers classes of FLUX.1, with random weights, in the layout of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast  # type: ignore[attr-defined]

from erasekit.backbones.flux import Flux, FluxConfig
from erasekit.backbones.memory import Holding
from erasekit.testing.tiny import WIDTH, WORDS, text_config, tokenizer

POSITIONS = 12
TOKENS = 24  # width of T5


class TinyFlux(Flux):
    """A backbone for the tiny pipelines."""

    name: ClassVar[str] = "tiny-flux"
    domain: ClassVar[Literal["natural", "mini"]] = "mini"
    sampling: ClassVar[dict[str, Any]] = {"sampler": "default"}
    on_cpu: ClassVar[Holding] = Holding(rows=64)
    size: ClassVar[int] = 16
    size_step: ClassVar[int] = 4
    positions: ClassVar[int] = POSITIONS


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer that knows `WORDS` and letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(c, -9.0) for c in letters]
    tokens = T5TokenizerFast(vocab=pieces, extra_ids=0)
    tokens.model_max_length = POSITIONS
    return tokens


def t5_encoder(pieces: T5TokenizerFast, width: int) -> T5EncoderModel:
    """A T5 of two layers."""
    config = T5Config(
        vocab_size=len(pieces),
        d_model=width,
        d_kv=8,
        num_heads=2,
        d_ff=32,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def flow_vae(scaling: float, shift: float) -> AutoencoderKL:
    """An autoencoder for images of 16 pixels, whose latents are shifted."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def save_pipeline(folder: Path, *, kind: Literal["dev", "schnell"] = "dev", seed: int = 0, shard: str = "10GB") -> Path:
    """Write a tiny FLUX folder (16 x 16 images, 4 x 4 packed tokens) and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer(folder / "tokenizer")
        pieces = t5_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TOKENS,
            pooled_projection_dim=WIDTH,
            guidance_embeds=kind == "dev",
            axes_dims_rope=(4, 6, 6),
        )
        dynamic = (
            {"use_dynamic_shifting": True, "shift": 3.0} if kind == "dev" else {"use_dynamic_shifting": False, "shift": 1.0}
        )
        pipe: Any = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, **dynamic
            ),
            vae=flow_vae(0.3611, 0.1159),
            text_encoder=CLIPTextModel(text_config(words)),
            tokenizer=words,
            text_encoder_2=t5_encoder(pieces, TOKENS),
            tokenizer_2=pieces,
            transformer=transformer,
        )
    pipe.save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, **settings: Any) -> TinyFlux:
    """The backbone of a tiny folder, on the CPU, in float32."""
    return TinyFlux.load(FluxConfig(path=str(folder), device="cpu", dtype="float32", **settings))
