"""Train the UNet of `sd15-mini` and put the pipeline together in a standard diffusers folder."""

from __future__ import annotations

import argparse
import os

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from data import WORK, Images
from loop import fit, plateau

DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build(width: int) -> UNet2DConditionModel:
    """The UNet before training: three levels at 16, 8 and 4 pixels, text enters at the lower two."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


@torch.no_grad()
def encode_images(vae: AutoencoderTiny, images: Images) -> torch.Tensor:
    """Scaled latents (n, 4, 16, 16) of all images, as float16."""
    latents = [vae.encode(images.batch(i)).latents.half() for i in torch.arange(len(images)).split(200)]
    return torch.cat(latents) * vae.config.scaling_factor


@torch.no_grad()
def encode_captions(captions: list[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the distinct captions, the empty one first, and for each caption which row is its own."""
    distinct = ["", *sorted(set(captions))]
    row = {caption: i for i, caption in enumerate(distinct)}
    ids = torch.tensor(tokenizer(distinct, padding="max_length", truncation=True).input_ids)
    return torch.cat([encoder(i)[0] for i in ids.split(256)]), torch.tensor([row[c] for c in captions])


def save_pipeline(unet: UNet2DConditionModel) -> None:
    """Write the diffusers folder in half precision."""
    scheduler = DDIMScheduler(
        **DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(WORK / "vae"),
        # with its projection, which the CLIP scorer needs and which loads as a plain CLIPTextModel too
        text_encoder=CLIPTextModelWithProjection.from_pretrained(WORK / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(WORK / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(WORK / "sd15-mini")
    index = WORK / "sd15-mini" / "model_index.json"
    index.write_text(index.read_text().replace("CLIPTextModelWithProjection", "CLIPTextModel"))


def main() -> None:
    """Train with epsilon prediction and min-SNR weights, then save."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--steps", type=int, default=8000)
    args.add_argument("--batch", type=int, default=64)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--compile", action="store_true")
    args = args.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    images = Images("train")
    tokenizer, encoder = (
        CLIPTokenizer.from_pretrained(WORK / "tokenizer"),
        CLIPTextModel.from_pretrained(WORK / "text_encoder").eval(),
    )
    latents = encode_images(AutoencoderTiny.from_pretrained(WORK / "vae").eval(), images)
    embeddings, row = encode_captions(images.captions, tokenizer, encoder)
    unet = build(encoder.config.hidden_size).to(memory_format=torch.channels_last)
    alphas = DDPMScheduler(**DIFFUSION).alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5) / snr

    def objective(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        a = alphas[t][:, None, None, None]
        error = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, text).sample - noise
        return (weights[t] * error.square().mean((1, 2, 3))).mean()

    compiled = torch.compile(objective) if args.compile else objective

    def loss(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(latents), (args.batch,), generator=generator)
        x = latents[index].float().contiguous(memory_format=torch.channels_last)
        kept = torch.rand(args.batch, generator=generator) >= 0.1
        t = torch.randint(1000, (args.batch,), generator=generator)
        return compiled(x, t, embeddings[row[index] * kept], torch.randn(x.shape, generator=generator))

    print(f"{sum(p.numel() for p in unet.parameters())} weights, {len(embeddings)} captions, process {os.getpid()}", flush=True)
    unet = fit("unet", unet, loss, steps=args.steps, lr=1.2e-3, ema_decay=0.999, schedule=plateau, folder=WORK)
    save_pipeline(unet)


if __name__ == "__main__":
    main()
