"""Tiny FLUX.2 [klein] pipelines, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM  # type: ignore[attr-defined]

from erasekit.backbones.flux2 import LAYERS, Flux2Klein4B, Flux2KleinBase4B
from erasekit.backbones.memory import Holding
from erasekit.backbones.protocol import BackboneConfig
from erasekit.testing.tiny import WORDS

POSITIONS = 32
WIDTH = 16  # of the language model
# The format of Qwen3's: turns between marks, and an empty thought before an answer that is to come without one.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


class TinyFlux2Base(Flux2KleinBase4B):
    """A backbone for the tiny pipelines."""

    name: ClassVar[str] = "tiny-flux2-base"
    domain: ClassVar[Literal["natural", "mini"]] = "mini"
    sampling: ClassVar[dict[str, Any]] = {"sampler": "default"}
    on_cpu: ClassVar[Holding] = Holding(rows=64)
    size: ClassVar[int] = 16
    size_step: ClassVar[int] = 4
    positions: ClassVar[int] = POSITIONS


class TinyFlux2(TinyFlux2Base, Flux2Klein4B):
    """A backbone for the tiny distilled pipelines."""

    name: ClassVar[str] = "tiny-flux2"
    sampling: ClassVar[dict[str, Any]] = {"sampler": "default"}


def tokenizer() -> Qwen2TokenizerFast:
    """A tokenizer of Qwen3's kind that knows `WORDS`, with a space before them and without, and spells all else in bytes."""
    vocabulary, merges = sorted(ByteLevel.alphabet()), list[tuple[str, str]]()
    for word in ("assistant", "user", *WORDS, "ĊĊ"):
        steps = [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]
        merges += [step for step in steps if step not in merges]
    vocabulary += ["".join(step) for step in merges]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate([*vocabulary, *marks])},
        merges=merges,
        eos_token="<|im_end|>",
        additional_special_tokens=marks[1:2],
        model_max_length=POSITIONS,
    )
    tokens.add_tokens(["<think>", "</think>"])
    tokens.chat_template = TEMPLATE
    return tokens


def save_pipeline(folder: Path, *, distilled: bool = True) -> Path:
    """Write a tiny FLUX.2 folder (16 x 16 images, 4 x 4 packed tokens) and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = tokenizer()
        language = Qwen3Config(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=max(LAYERS) + 1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.2,
            tie_word_embeddings=True,
            pad_token_id=tokens.pad_token_id,
            eos_token_id=tokens.eos_token_id,
        )
        transformer: Any = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=len(LAYERS) * WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        with torch.no_grad():  # so that images depend on prompts
            for name, weight in transformer.named_parameters():
                weight.mul_(3 if "stream_modulation" in name else 1)
        pipe: Any = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=vae(),
            text_encoder=Qwen3ForCausalLM(language),
            tokenizer=tokens,
            transformer=transformer,
            is_distilled=distilled,
        )
    pipe.save_pretrained(folder)
    return folder


def vae() -> Any:
    """An autoencoder for images of 16 pixels whose batch norm has seen latents that are not normal."""
    model: Any = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2.0)
    return model


def load(
    folder: Path, *, dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32", distilled: bool = True
) -> TinyFlux2Base:
    """The backbone of a tiny folder, on the CPU."""
    kind = TinyFlux2 if distilled else TinyFlux2Base
    return kind.load(BackboneConfig(path=str(folder), device="cpu", dtype=dtype))
