"""Stable Diffusion XL: a UNet that reads two CLIP encoders, and a summary of the prompt beside the size of the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from erasekit.backbones.folders import part_config
from erasekit.backbones.memory import Activations, Holding
from erasekit.backbones.protocol import Conditioning, Site
from erasekit.backbones.schedule import ddpm_timestep
from erasekit.backbones.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """SDXL base.

    The tokens of both encoders stand side by side in one embedding. `pooled` is the second encoder's summary, followed by zeros
    in the place of the sizes that `add_embedding.linear_1` reads with it: an edit of that layer leaves its other columns alone.
    """

    name: ClassVar[str] = "sdxl"
    path: ClassVar[str] = "stabilityai/stable-diffusion-xl-base-1.0"
    pipeline_class: ClassVar[str] = "StableDiffusionXLPipeline"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    reads: ClassVar[Mapping[str, Literal["tokens", "pooled"]]] = {"text_encoder": "tokens", "text_encoder_2": "tokens"}
    unused: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    sampling: ClassVar[Mapping[str, Any]] = {"guidance": 5.0, "size": 1024}
    scopes: ClassVar[Mapping[str, str]] = {
        **StableDiffusion.scopes,
        "text": r"(\.attn2\.to_[kv]|^add_embedding\.linear_1)$",
    }
    holding: ClassVar[Mapping[int, Holding]] = {
        8: Holding(rows=2, encoders="released", checkpointing=True, slicing=True),
        12: Holding(rows=4, checkpointing=True, slicing=True),
        16: Holding(rows=8, checkpointing=True, slicing=True),
        24: Holding(rows=8, checkpointing=True),
        32: Holding(rows=16, checkpointing=True),
        48: Holding(rows=16),
        80: Holding(rows=32),
        141: Holding(rows=32),
    }
    sizes_gb: ClassVar[tuple[float, float, float]] = (4.78, 1.52, 0.16)
    architecture: ClassVar[tuple[str, Mapping[str, Any]]] = (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    )

    def text_sites(self) -> list[Site]:
        """The keys and values of every cross-attention, and the layer that reads the prompt's summary."""
        return [*super().text_sites(), Site("add_embedding.linear_1", "pooled")]

    @classmethod
    def activations(cls, size: int) -> Activations:
        """What a row takes at 16 bits, for an image of `size` pixels: found with fake tensors at 1024, in proportion else."""
        at_1024 = Activations(forward=0.16, kept=5.05, checkpointed=0.53, maps=1.36, decode=1.55)
        return Activations(*(gb * (size / 1024) ** 2 for gb in at_1024))

    @classmethod
    def tflop(cls, size: int) -> float:
        """About how many TFLOP a forward pass of one row is."""
        return 6.0 * (size / 1024) ** 2

    def embed(
        self,
        tokens: Mapping[str, torch.Tensor],
        vectors: Mapping[str, torch.Tensor] | None = None,
        *,
        like: Conditioning | None = None,
    ) -> Conditioning:
        """Encode token ids, differentiable in `vectors`; see `Backbone`. The encoders' states before the last layer count."""
        found = None if like is None else like.to(self.device, self.dtype)
        width = self._part("text_encoder").config.hidden_size
        sides = [] if found is None else list(found.tokens.split([width, found.tokens.shape[-1] - width], -1))
        pooled = None if found is None else found.pooled
        for place, name in enumerate(self.encoders):
            if name not in tokens:
                continue
            out = self._read(name, tokens[name], vectors, output_hidden_states=True)
            sides[place : place + 1] = [out.hidden_states[-2].to(self.device, self.dtype)]
            pooled = self._padded(out.text_embeds.to(self.device, self.dtype)) if place else pooled
        ids = tokens["text_encoder"].cpu() if "text_encoder" in tokens or found is None else found.ids
        ends = (ids == self._pipe.tokenizer.eos_token_id).int().argmax(1) + 1
        return Conditioning(torch.cat(sides, -1), pooled, ids, ends)

    def call_arguments(self, cond: Conditioning, *, empty: Conditioning, guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline's call for encoded prompts."""
        given, none = (c.to(self.device, self.dtype) for c in (cond, empty.repeat(len(cond))))
        pooled = {"pooled_prompt_embeds": self._summary(given), "negative_pooled_prompt_embeds": self._summary(none)}
        return super().call_arguments(cond, empty=empty, guidance=guidance) | pooled

    def _predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning, guidance: float) -> torch.Tensor:
        """Epsilon (b, 4, h, w) of whole images as large as the latents say."""
        side = float(x.shape[-1]) * 1024 / self._side(1024)
        sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=x.device, dtype=x.dtype).repeat(len(x), 1)
        prediction: torch.Tensor = self.denoiser(
            x,
            ddpm_timestep(tau, self._ddim.config.num_train_timesteps).to(x.device),
            encoder_hidden_states=cond.tokens,
            added_cond_kwargs={"text_embeds": self._summary(cond), "time_ids": sizes},
            return_dict=False,
        )[0]
        return prediction

    def _share_of(self, x: torch.Tensor) -> float:
        return x.shape[-1] * x.shape[-2] / 128**2

    def _tokenizer(self, encoder: str) -> tuple[Any, int]:
        tokenizer = self._pipe.tokenizer if encoder == "text_encoder" else self._pipe.tokenizer_2
        return tokenizer, tokenizer.model_max_length

    def _encode(self, prompt: str) -> Conditioning:
        tokens, _, pooled, _ = self._pipe.encode_prompt(
            prompt, None, self._pipe.text_encoder.device, 1, do_classifier_free_guidance=False
        )
        if not prompt and self._pipe.config.force_zeros_for_empty_prompt:  # what the pipeline guides away from
            tokens, pooled = torch.zeros_like(tokens), torch.zeros_like(pooled)
        ids = self._tokenized(prompt, *self._tokenizer("text_encoder"))
        return Conditioning(tokens=tokens, pooled=self._padded(pooled), **ids)

    def _padded(self, summary: torch.Tensor) -> torch.Tensor:
        """A summary as the layer reads it, zeros in the place of sizes."""
        config = part_config(self._folder, self.prefix)
        width: int = config["projection_class_embeddings_input_dim"]
        return torch.nn.functional.pad(summary, (0, width - summary.shape[-1]))

    def _summary(self, cond: Conditioning) -> torch.Tensor:
        """The summary by itself; six numbers for the size follow it."""
        assert cond.pooled is not None
        sizes = 6 * part_config(self._folder, self.prefix)["addition_time_embed_dim"]
        return cond.pooled[:, : cond.pooled.shape[-1] - sizes]
