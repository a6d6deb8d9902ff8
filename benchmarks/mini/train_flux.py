"""Train the transformer of `flux-mini`, then distil guidance into it, and put the pipeline together in a diffusers folder.

Phase one is rectified flow with dropped captions, so that classifier-free guidance works (the guidance embedding reads 1).
Phase two is FLUX.1-dev's guidance distillation: for g in [1, 6] the student, told g, learns the teacher's guided velocity.
"""

from __future__ import annotations

import argparse
import copy
import os
from functools import partial

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from data import WORK, Images
from loop import fit, plateau
from train_sd15 import encode_images

GRID = 8  # packed latents: 8 x 8 tokens of 2 x 2 x 4 channels
GUIDANCE = (1.0, 6.0)


def build(tokens: int, pooled: int) -> FluxTransformer2DModel:
    """The transformer before training: every block begins as the identity (AdaLN-zero)."""
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=tokens,
        pooled_projection_dim=pooled,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    modulations = [block.norm1.linear for block in model.transformer_blocks]
    modulations += [block.norm1_context.linear for block in model.transformer_blocks]
    modulations += [block.norm.linear for block in model.single_transformer_blocks]
    for linear in (*modulations, model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


@torch.no_grad()
def encode_captions(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """T5 tokens and CLIP vectors of the distinct captions, the empty one first, and each caption's row."""
    distinct = ["", *sorted(set(captions))]
    row = {caption: i for i, caption in enumerate(distinct)}
    t5, clip = (
        T5EncoderModel.from_pretrained(WORK / "text_encoder_2").eval(),
        CLIPTextModel.from_pretrained(WORK / "text_encoder").eval(),
    )
    pair = (T5TokenizerFast.from_pretrained(WORK / "tokenizer_2"), CLIPTokenizer.from_pretrained(WORK / "tokenizer"))
    long, short = (torch.tensor(t(distinct, padding="max_length", truncation=True).input_ids) for t in pair)
    tokens = torch.cat([t5(i)[0] for i in long.split(256)])
    pooled = torch.cat([clip(i).pooler_output for i in short.split(256)])
    return tokens, pooled, torch.tensor([row[c] for c in captions])


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(b, 4, 16, 16) -> (b, 64, 16), as FluxPipeline packs them."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def positions() -> torch.Tensor:
    """Row and column of every image token (64, 3), as FluxPipeline numbers them."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([torch.zeros(GRID, GRID), rows, columns], -1).reshape(-1, 3)


def save_pipeline(model: FluxTransformer2DModel, name: str) -> None:
    """Write the diffusers folder in half precision, with the scheduler of FLUX.1-dev."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        ),
        vae=AutoencoderTiny.from_pretrained(WORK / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(WORK / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(WORK / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(WORK / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(WORK / "tokenizer_2"),
        transformer=copy.deepcopy(model),
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(WORK / name)


class Training:
    """The images, their captions, and the losses of both phases."""

    def __init__(self, batch: int, styled: float) -> None:
        """Encode everything once; captions stand in rows, the empty one in the first.

        An image in an artist's style is drawn `styled` times as often as one without.
        """
        images = Images("train")
        self.batch, self.latents = batch, pack_all(images)
        self.weight = torch.where(images.labels["style"] > 0, styled, 1.0)
        self.tokens, self.pooled, self.row = encode_captions(images.captions)
        self.image_ids, self.text_ids = positions(), torch.zeros(self.tokens.shape[1], 3)

    def velocity(
        self, net: FluxTransformer2DModel, x: torch.Tensor, sigma: torch.Tensor, g: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """What a transformer predicts for noised latents under captions."""
        return net(
            hidden_states=x,
            timestep=sigma,
            guidance=g,
            encoder_hidden_states=self.tokens[rows],
            pooled_projections=self.pooled[rows],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Noised latents, their progress, their velocity and caption rows; one caption in ten is empty."""
        index = torch.multinomial(self.weight, self.batch, replacement=True, generator=generator)
        clean, noise = self.latents[index].float(), torch.randn(self.batch, *self.latents.shape[1:], generator=generator)
        sigma = torch.randn(self.batch, generator=generator).sigmoid()
        kept = torch.rand(self.batch, generator=generator) >= 0.1
        return torch.lerp(clean, noise, sigma[:, None, None]), sigma, noise - clean, self.row[index] * kept

    def flow(self, model: FluxTransformer2DModel, generator: torch.Generator) -> torch.Tensor:
        """The loss of phase one."""
        x, sigma, target, rows = self.draw(generator)
        return (self.velocity(model, x, sigma, torch.ones_like(sigma), rows) - target).square().mean()

    def distillation(
        self, model: FluxTransformer2DModel, teacher: FluxTransformer2DModel, generator: torch.Generator
    ) -> torch.Tensor:
        """The loss of phase two."""
        x, sigma, _, rows = self.draw(generator)
        low, high = GUIDANCE
        g = low + (high - low) * torch.rand(self.batch, generator=generator)
        one, both = torch.ones_like(sigma), torch.cat([rows, torch.zeros_like(rows)])
        with torch.no_grad():
            twice = (torch.cat([t, t]) for t in (x, sigma, one))
            guided, plain = self.velocity(teacher, *twice, both).chunk(2)
            target = plain + g[:, None, None] * (guided - plain)
        return (self.velocity(model, x, sigma, g, rows) - target).square().mean()


@torch.no_grad()
def pack_all(images: Images) -> torch.Tensor:
    """Packed latents of all images (n, 64, 16), as float16."""
    return pack(encode_images(AutoencoderTiny.from_pretrained(WORK / "vae").eval(), images).float()).half()


def main() -> None:
    """Train both phases and save after each."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--start", help="folder of a trained transformer to go on from; random weights without it")
    args.add_argument("--styled", type=float, default=2.0, help="how often styled images are drawn, against others")
    args.add_argument("--lr", type=float, default=1e-3, help="of phase one; 5e-4 when going on")
    args.add_argument("--steps", type=int, default=8000)
    args.add_argument("--distil", type=int, default=1200)
    args.add_argument("--batch", type=int, default=32)
    args.add_argument("--threads", type=int, default=1)
    args = args.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    training = Training(args.batch, args.styled)
    if args.start:
        model = FluxTransformer2DModel.from_pretrained(args.start, torch_dtype=torch.float32)
    else:
        model = build(training.tokens.shape[-1], training.pooled.shape[-1])
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights} weights, {len(training.tokens)} captions, process {os.getpid()}", flush=True)
    flow = partial(training.flow, model)
    teacher = fit("flux", model, flow, steps=args.steps, lr=args.lr, ema_decay=0.999, schedule=plateau, folder=WORK)
    save_pipeline(teacher, "flux-mini")
    if not args.distil:
        return
    teacher.requires_grad_(False)
    model.load_state_dict(teacher.state_dict())
    distillation = partial(training.distillation, model, teacher)
    student = fit("flux-distilled", model, distillation, steps=args.distil, lr=3e-4, ema_decay=0.995, folder=WORK)
    save_pipeline(student, "flux-mini")


if __name__ == "__main__":
    main()
