"""FLUX.1: a rectified-flow transformer; text enters through T5 tokens and a pooled CLIP vector, at two linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from erasekit.backbones.folders import part_config
from erasekit.backbones.memory import Activations, Holding
from erasekit.backbones.pipelines import PipelineBackbone
from erasekit.backbones.protocol import BackboneConfig, Capabilities, Conditioning, Site
from erasekit.backbones.schedule import Schedule, flow_sigma, flow_tau, per_row


class FluxConfig(BackboneConfig):
    """Settings of FLUX."""

    guidance: Literal["embedded", "cfg"] = Field(
        "embedded", description="embedded: the model is told the scale; cfg: true classifier-free guidance, twice the work"
    )


class Flux(PipelineBackbone):
    """FLUX.1-dev. Latents are packed, (b, tokens, 64): 2 x 2 latent pixels each.

    If both text sites give the same for two prompts, the whole forward does, at every step: text enters nowhere else.
    """

    name: ClassVar[str] = "flux"
    path: ClassVar[str] = "black-forest-labs/FLUX.1-dev"
    licence: ClassVar[Mapping[str, str]] = {"license": "other", "license_name": "flux-1-dev-non-commercial-license"}
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="dit", prediction="velocity", guidance="embedded", text="bidirectional"
    )
    prefix: ClassVar[str] = "transformer"
    Config: ClassVar[type[BackboneConfig]] = FluxConfig
    pipeline_class: ClassVar[str] = "FluxPipeline"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    reads: ClassVar[Mapping[str, Literal["tokens", "pooled"]]] = {"text_encoder": "pooled", "text_encoder_2": "tokens"}
    unused: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")
    scopes: ClassVar[Mapping[str, str]] = {
        "add_kv": r"^transformer_blocks\.\d+\.attn\.add_[kv]_proj$",
        "add_qk": r"^transformer_blocks\.\d+\.attn\.add_[qk]_proj$",
        "qk_dual": r"^transformer_blocks\.\d+\.attn\.(add_[qk]_proj|to_[qk])$",
        "all_attn": r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
        "all": r"",
        "text": r"^(context_embedder|time_text_embed\.text_embedder\.linear_1)$",
    }
    size: ClassVar[int] = 512
    positions: ClassVar[int] = 512
    size_step: ClassVar[int] = 16
    sampling: ClassVar[Mapping[str, Any]] = {"sampler": "default", "steps": 28, "guidance": 3.5, "size": size}
    holding: ClassVar[Mapping[int, Holding]] = {
        8: Holding(1, "offload", "cpu", checkpointing=True, slicing=True),
        12: Holding(1, "nf4", "released", checkpointing=True, slicing=True),
        16: Holding(2, "nf4", "released", checkpointing=True, slicing=True),
        24: Holding(4, "nf4", "released", checkpointing=True, slicing=True),
        32: Holding(2, "whole", "released", checkpointing=True, slicing=True),
        48: Holding(4, "whole", "released", checkpointing=True),
        80: Holding(8, "whole", "released", checkpointing=True),
        141: Holding(8, "whole", "released"),
    }
    on_cpu: ClassVar[Holding] = Holding(1, "whole", "released", checkpointing=True)
    sizes_gb: ClassVar[tuple[float, float, float]] = (22.2, 9.1, 0.16)
    architecture: ClassVar[tuple[str, Mapping[str, Any]]] = ("FluxTransformer2DModel", {"guidance_embeds": True})
    cpu_dtype: ClassVar[torch.dtype] = torch.bfloat16

    def __init__(self, folder: Path, config: BackboneConfig, **where: Any) -> None:
        """See `PipelineBackbone`."""
        super().__init__(folder, config, **where)
        self._length = min(self.positions, self._pipe.tokenizer_2.model_max_length)
        self._cfg = getattr(config, "guidance", "embedded") == "cfg"

    @property
    def embedded_guidance(self) -> bool:
        """Whether the model is told the guidance scale, as the configuration says."""
        return not self._cfg

    def spans(self, prompt: str, phrase: str) -> list[range]:
        """T5 token positions at which `phrase` stands in `prompt` as whole words."""
        return self._spans(prompt, phrase, *self._tokenizer("text_encoder_2"))

    def text_sites(self) -> list[Site]:
        """The two entrances of text. Their biases are not part of an edit."""
        return [Site("context_embedder", "tokens"), Site("time_text_embed.text_embedder.linear_1", "pooled")]

    def schedule(self, steps: int, size: int | None = None) -> Schedule:
        """The steps of the pipeline's own scheduler, shifted by the number of image tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = self._pipe.scheduler
        config = scheduler.config
        shift = calculate_shift(
            self._tokens(size) ** 2, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
        return Schedule(timesteps=scheduler.timesteps.clone(), tau=flow_tau(scheduler.sigmas[:-1]))

    def latents(self, seeds: Sequence[int], size: int | None = None) -> torch.Tensor:
        """Initial noise (n, tokens, channels), the same as the pipeline draws for CPU generators with these seeds."""
        channels, side = self._channels // 4, 2 * self._tokens(size)
        noise = self._noise(seeds, (channels, side, side))
        packed: torch.Tensor = self._pipe._pack_latents(noise, *noise.shape)
        return packed

    @classmethod
    def activations(cls, size: int) -> Activations:
        """What a row takes at 16 bits, for an image of `size` pixels.

        Found with fake tensors at 512 pixels and 512 positions of text. Other sizes are in proportion to all tokens, maps to
        the image's tokens times all.
        """
        at_512 = Activations(forward=0.16, kept=7.1, checkpointed=0.76, maps=4.2, decode=0.38)
        image = (size / 16) ** 2
        share = (image + cls.positions) / (1024 + 512)
        maps = image * (image + cls.positions) / (1024 * (1024 + 512))
        shares = (share, share, share, maps, (size / 512) ** 2)
        return Activations(*(gb * each for gb, each in zip(at_512, shares, strict=True)))

    @classmethod
    def tflop(cls, size: int) -> float:
        """About how many TFLOP a forward pass of one row is: two for each weight and token."""
        return float(2 * 11.9e-3 * ((size // 16) ** 2 + cls.positions))

    def _predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning, guidance: float) -> torch.Tensor:
        """Velocity (b, tokens, channels); square images only. With true guidance the model is told 1, as in sampling."""
        denoiser, told = self.denoiser, 1.0 if self._cfg else guidance
        side = round(x.shape[1] ** 0.5)
        scale = torch.full((len(x),), told, device=x.device) if denoiser.config.guidance_embeds else None
        velocity: torch.Tensor = denoiser(
            hidden_states=x,
            timestep=(flow_sigma(tau) * 1000).to(x) / 1000,
            guidance=scale,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            txt_ids=torch.zeros(cond.tokens.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=self._pipe._prepare_latent_image_ids(len(x), side, side, x.device, x.dtype),
            return_dict=False,
        )[0]
        return velocity

    def _share_of(self, x: torch.Tensor) -> float:
        return float(x.shape[1] + self._length) / (1024 + 512)

    def step(self, prediction: torch.Tensor, x: torch.Tensor, k: int, schedule: Schedule) -> torch.Tensor:
        """One Euler step, from step `k` to the next."""
        sigma = torch.cat([flow_sigma(schedule.tau), torch.zeros(1)]).float()
        return (x.float() + (sigma[k + 1] - sigma[k]).to(x.device) * prediction).to(prediction.dtype)

    def to_x0(self, prediction: torch.Tensor, x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """Finished latents x0 = x - sigma v."""
        return x - per_row(flow_sigma(tau).to(x), x) * prediction

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """Latents x = (1 - sigma) x0 + sigma noise."""
        return torch.lerp(x0, noise, per_row(flow_sigma(tau).to(x0), x0))

    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        """Finished latents (n, tokens, channels) of images (n, 3, h, w) in [-1, 1], packed."""
        latents = super().to_latents(images)
        packed: torch.Tensor = self._pipe._pack_latents(latents, *latents.shape)
        return packed

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, h, w) in [-1, 1] of packed latents."""
        side = round(x0.shape[1] ** 0.5)
        grid = x0.unflatten(1, (side, side)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return super().decode(grid.flatten(4, 5).flatten(2, 3))

    def call_arguments(self, cond: Conditioning, *, empty: Conditioning, guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline's call for encoded prompts."""
        cond, none = (c.to(self.device, self.dtype) for c in (cond, empty.repeat(len(cond))))
        given = {"prompt_embeds": cond.tokens, "pooled_prompt_embeds": cond.pooled}
        if not self._cfg:
            return given | {"guidance_scale": guidance}
        given |= {"negative_prompt_embeds": none.tokens, "negative_pooled_prompt_embeds": none.pooled}
        return given | {"guidance_scale": 1.0, "true_cfg_scale": guidance}

    @property
    def _channels(self) -> int:
        channels: int = part_config(self._folder, self.prefix)["in_channels"]
        return channels

    def _tokens(self, size: int | None) -> int:
        """Image tokens along a side."""
        return self._side(size or self.size) // 2

    def _tokenizer(self, encoder: str) -> tuple[Any, int]:
        if encoder == "text_encoder":
            return self._pipe.tokenizer, self._pipe.tokenizer.model_max_length
        return self._pipe.tokenizer_2, self._length

    def _encode(self, prompt: str) -> Conditioning:
        tokens, pooled, _ = self._pipe.encode_prompt(
            prompt, None, self._pipe.text_encoder.device, 1, max_sequence_length=self._length
        )
        ids = self._tokenized(prompt, *self._tokenizer("text_encoder_2"))
        return Conditioning(tokens=tokens, pooled=pooled, **ids)


class FluxSchnell(Flux):
    """FLUX.1-schnell: four steps, no guidance."""

    name: ClassVar[str] = "flux-schnell"
    path: ClassVar[str] = "black-forest-labs/FLUX.1-schnell"
    licence: ClassVar[Mapping[str, str]] = {"license": "apache-2.0"}
    positions: ClassVar[int] = 256
    sampling: ClassVar[Mapping[str, Any]] = {"sampler": "default", "steps": 4, "guidance": 0.0, "size": Flux.size}
