"""FLUX.1: a rectified-flow transformer; text enters through T5 tokens and a pooled CLIP vector, at two linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from erasekit.backbones.memory import Activations, Holding
from erasekit.backbones.mmdit import Mmdit
from erasekit.backbones.protocol import BackboneConfig, Capabilities, Conditioning
from erasekit.backbones.schedule import Schedule, flow_sigma, flow_tau


class FluxConfig(BackboneConfig):
    """Settings of FLUX."""

    guidance: Literal["embedded", "cfg"] = Field(
        "embedded", description="embedded: the model is told the scale; cfg: true classifier-free guidance, twice the work"
    )


class Flux(Mmdit):
    """FLUX.1-dev. Latents are packed, (b, tokens, 64): 2 x 2 latent pixels each."""

    name: ClassVar[str] = "flux"
    path: ClassVar[str] = "black-forest-labs/FLUX.1-dev"
    licence: ClassVar[Mapping[str, str]] = {"license": "other", "license_name": "flux-1-dev-non-commercial-license"}
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="dit", prediction="velocity", guidance="embedded", text="bidirectional"
    )
    Config: ClassVar[type[BackboneConfig]] = FluxConfig
    pipeline_class: ClassVar[str] = "FluxPipeline"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    reads: ClassVar[Mapping[str, Literal["tokens", "pooled"]]] = {"text_encoder": "pooled", "text_encoder_2": "tokens"}
    size: ClassVar[int] = 512
    positions: ClassVar[int] = 512
    measured: ClassVar[tuple[int, int, Activations]] = (
        512,
        512,
        Activations(forward=0.16, kept=7.1, checkpointed=0.76, maps=4.2, decode=0.38),
    )
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

    def schedule(self, steps: int, size: int | None = None) -> Schedule:
        """The steps of the pipeline's own scheduler, shifted by the number of image tokens."""
        scheduler = self._pipe.scheduler
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=self._shift(size))
        return Schedule(timesteps=scheduler.timesteps.clone(), tau=flow_tau(scheduler.sigmas[:-1]))

    def latents(self, seeds: Sequence[int], size: int | None = None) -> torch.Tensor:
        """Initial noise (n, tokens, channels), the same as the pipeline draws for CPU generators with these seeds."""
        channels, side = self._channels // 4, 2 * self._tokens(size)
        noise = self._noise(seeds, (channels, side, side))
        packed: torch.Tensor = self._pipe._pack_latents(noise, *noise.shape)
        return packed

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

    def _tokens_of(self, x: torch.Tensor) -> int:
        return x.shape[1]

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
        given = self._given(cond, empty, negative=self._cfg)
        return given | ({"guidance_scale": 1.0, "true_cfg_scale": guidance} if self._cfg else {"guidance_scale": guidance})

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
