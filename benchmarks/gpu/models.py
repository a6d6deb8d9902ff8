"""Write SD1.5 and FLUX.1-dev with random weights to a folder in the hub's layout: no network is needed.

    python benchmarks/gpu/models.py flux FOLDER --device cuda
    python benchmarks/gpu/models.py flux FOLDER --holes        # in no time, on a small disk

All parts have their public configurations, text encoders at full depth; the weights are drawn on the device and written as
bfloat16. Tokenizers are those of the shipped mini models: the few words that they know are no part of what is measured.

With `--holes` the files are as large and are read as ever, but the denoiser and T5 are zeros that take no room on a disk.
What a closed form needs has values: the layers that read text, and T5's table of tokens, which layers of zeros pass on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

MINI = Path(__file__).parents[2] / "plugins" / "erasekit_mini" / "models"
DONE = "complete"  # written last: a folder without it is of a build that was stopped

UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest is the class's default
FLUX = {"in_channels": 64, "guidance_embeds": True}  # likewise
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
VAE = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}

TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
TINY_FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
TINY_CLIP = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_T5 = {"vocab_size": 300, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
TINY_VAE = {"block_out_channels": (8, 8), "norm_num_groups": 4}


def clip(*, tiny: bool) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The text encoder of CLIP ViT-L/14 and a tokenizer."""
    tokens = CLIPTokenizer.from_pretrained(MINI / "sd15-mini" / "tokenizer", model_max_length=77)
    ids = {f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return CLIPTextModel(CLIPTextConfig(**(TINY_CLIP if tiny else CLIP), **ids)), tokens


def t5(*, tiny: bool) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """The encoder of T5-XXL and a tokenizer; FLUX.1-dev reads 512 tokens."""
    tokens = T5TokenizerFast.from_pretrained(MINI / "flux-mini" / "tokenizer_2", model_max_length=24 if tiny else 512)
    settings = {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False}
    return T5EncoderModel(T5Config(**(TINY_T5 if tiny else T5_XXL), **settings)), tokens


def vae(channels: int, *, tiny: bool, **settings: Any) -> AutoencoderKL:
    """The autoencoder that both families have."""
    shape = TINY_VAE if tiny else VAE
    n = len(shape["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    return AutoencoderKL(**kinds, **shape, latent_channels=channels, layers_per_block=2, **settings)


def stable_diffusion(*, tiny: bool) -> StableDiffusionPipeline:
    """SD1.5."""
    text, words = clip(tiny=tiny)
    return StableDiffusionPipeline(
        vae=vae(4, tiny=tiny),
        text_encoder=text,
        tokenizer=words,
        unet=UNet2DConditionModel(**(TINY_UNET if tiny else UNET)),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux(*, tiny: bool) -> FluxPipeline:
    """FLUX.1-dev."""
    text, words = clip(tiny=tiny)
    text_2, pieces = t5(tiny=tiny)
    transformer = FluxTransformer2DModel(**(TINY_FLUX if tiny else FLUX))
    scales = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    return FluxPipeline(
        vae=vae(transformer.config.in_channels // 4, tiny=tiny, **scales),
        text_encoder=text,
        tokenizer=words,
        text_encoder_2=text_2,
        tokenizer_2=pieces,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        ),
    )


FAMILIES = {"sd15": stable_diffusion, "flux": flux}
HOLLOW = {"transformer": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder_2": "model"}
FILLED = re.compile(r"attn2\.to_[kv]|context_embedder|text_embedder\.linear_1|(shared|embed_tokens|final_layer_norm)\.weight$")
SHARD = 5 * 10**9  # bytes


def build(family: str, folder: Path, device: str, *, tiny: bool, holes: bool = False) -> Path:
    """Write a pipeline with random weights, or with holes in their place; one that is there and whole is kept."""
    if not (folder / DONE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta" if holes else device):
            pipe = FAMILIES[family](tiny=tiny)
        hollow = {name: getattr(pipe, name) for name in HOLLOW if holes and hasattr(pipe, name)}
        for name in hollow:
            setattr(pipe, name, None)
        if holes:
            pipe.text_encoder, pipe.vae = CLIPTextModel(pipe.text_encoder.config), AutoencoderKL.from_config(pipe.vae.config)
        torch.set_default_dtype(torch.float32)
        pipe.save_pretrained(folder, max_shard_size="5GB")
        for name, part in hollow.items():
            write_holes(part, folder / name, HOLLOW[name])
        if hollow:
            index = folder / "model_index.json"
            kinds = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in hollow.items()}
            index.write_text(json.dumps(json.loads(index.read_text()) | kinds, indent=2))
        (folder / DONE).touch()
    return folder


def write_holes(model: torch.nn.Module, folder: Path, stem: str) -> None:
    """Write the shards of a model whose weights are holes, but for those of `FILLED`, in bfloat16."""
    model.config.save_pretrained(folder) if hasattr(model.config, "save_pretrained") else model.save_config(folder)
    own = {name: p for name, p in model.state_dict().items() if name != "encoder.embed_tokens.weight"}  # T5's table, twice
    shards, size = [[]], 0
    for name, p in own.items():
        if shards[-1] and size + 2 * p.numel() > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * p.numel()
    places = {}
    for k, names in enumerate(shards, 1):
        file = f"{stem}-{k:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, file)
        write_shard({name: own[name].shape for name in names}, folder / file)
    total = {"total_size": 2 * sum(p.numel() for p in own.values())}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": places}))


def write_shard(shapes: dict[str, torch.Size], path: Path) -> None:
    """Write a safetensors file of bfloat16 tensors that are holes, but for those of `FILLED`."""
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * shape.numel()]}
        at += 2 * shape.numel()
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
        for name, shape in shapes.items():
            if FILLED.search(name):
                values = torch.ones(shape) if "norm" in name else torch.randn(shape) / shape[-1] ** 0.5
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(values.bfloat16().view(torch.int16).numpy().tobytes())


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("family", choices=FAMILIES)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--tiny", action="store_true", help="a few thousand weights")
    arguments.add_argument("--holes", action="store_true", help="zeros that take no room, but for the layers that read text")
    given = arguments.parse_args()
    build(given.family, given.folder, given.device, tiny=given.tiny, holes=given.holes)
