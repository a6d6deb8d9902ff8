"""Train the autoencoder of the mini models: AutoencoderTiny, 64 x 64 x 3 -> 16 x 16 x 4, latents centred and of unit size."""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F

from data import WORK, Images
from loop import fit


def build() -> AutoencoderTiny:
    """The autoencoder before training."""
    width = 24
    return AutoencoderTiny(
        encoder_block_out_channels=(width, width, width),
        decoder_block_out_channels=(width, width, width),
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
    )


def main() -> None:
    """Train, measure the PSNR on held-out renders, save."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--steps", type=int, default=9000)
    args.add_argument("--threads", type=int, default=1)
    args = args.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    images, vae = Images("train"), build().to(memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = images.batch(torch.randint(len(images), (8,), generator=generator))
        z = vae.encoder(x)
        error = vae.decoder(z + 0.1 * torch.randn(z.shape, generator=generator)) - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        moments = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        return error.abs().mean() + 0.5 * edges + 2 * error.square().mean() + 0.02 * moments

    vae = fit("vae", vae, loss, steps=args.steps, lr=2e-3, weight_decay=0.0, ema_decay=0.995, folder=WORK)
    test = Images("test")
    with torch.no_grad():
        batches = [test.batch(i) for i in torch.arange(1024).split(64)]
        z = torch.cat([vae.encode(x).latents for x in batches])
        mse = torch.stack([F.mse_loss(vae.decode(vae.encode(x).latents).sample.clamp(-1, 1), x) for x in batches]).mean()
    print(f"PSNR {10 * torch.log10(4 / mse):.2f} dB, latent mean {z.mean((0, 2, 3)).tolist()}, std {z.std((0, 2, 3)).tolist()}")
    # the latents are centred already, so that the same autoencoder serves pipelines that know no shift
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=0.0)
    vae.save_pretrained(WORK / "vae")


if __name__ == "__main__":
    main()
