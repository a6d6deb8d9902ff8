"""Stable Diffusion 1.x: a UNet that predicts epsilon, one CLIP text encoder, text read by 32 cross-attention layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.backbones.folders import part_config
from erasekit.backbones.held import of_diffusers
from erasekit.backbones.memory import Activations, Holding
from erasekit.backbones.pipelines import PipelineBackbone
from erasekit.backbones.protocol import BackboneConfig, Capabilities, Conditioning, Site
from erasekit.backbones.schedule import Schedule, ddpm_tau, ddpm_timestep, per_row
from erasekit.backbones.single_file import unpack
from erasekit.errors import EnvironmentProblem


class StableDiffusionConfig(BackboneConfig):
    """Settings of Stable Diffusion."""

    path: str = Field(
        "", description="hub id, local diffusers folder or single .safetensors file; empty means the backbone's own"
    )
    like: str = Field(
        "",
        description="for a single file: hub id or folder whose configs and tokenizer belong to it; empty: the backbone's own",
    )


class StableDiffusion(PipelineBackbone):
    """SD1.5, and the base of every model of its kind."""

    name: ClassVar[str] = "sd15"
    path: ClassVar[str] = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    licence: ClassVar[Mapping[str, str]] = {"license": "creativeml-openrail-m"}
    capabilities: ClassVar[Capabilities] = Capabilities(family="unet", prediction="epsilon", guidance="cfg", text="causal")
    prefix: ClassVar[str] = "unet"
    Config: ClassVar[type[BackboneConfig]] = StableDiffusionConfig
    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    unused: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    scopes: ClassVar[Mapping[str, str]] = {
        "kv": r"\.attn2\.to_[kv]$",
        "qk": r"\.attn2\.to_[qk]$",
        "cross": r"\.attn2\.",
        "attention": r"\.attn[12]\.",
        "all": r"",
    }
    holding: ClassVar[Mapping[int, Holding]] = {
        8: Holding(rows=8, checkpointing=True, slicing=True),
        12: Holding(rows=8, checkpointing=True, slicing=True),
        16: Holding(rows=16),
        24: Holding(rows=32),
        32: Holding(rows=32),
        48: Holding(rows=64),
        80: Holding(rows=64),
        141: Holding(rows=64),
    }
    sizes_gb: ClassVar[tuple[float, float, float]] = (1.6, 0.23, 0.16)
    architecture: ClassVar[tuple[str, Mapping[str, Any]]] = (
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    )

    def __init__(self, folder: Path, config: BackboneConfig, **where: Any) -> None:
        """See `PipelineBackbone`.

        Raises:
            EnvironmentProblem: the folder holds another kind of model.
        """
        super().__init__(folder, config, **where)
        scheduler = self._pipe.scheduler.config
        if scheduler.prediction_type != "epsilon":
            raise EnvironmentProblem(
                f"'{self.source}' predicts {scheduler.prediction_type}; '{self.name}' needs a model that predicts epsilon."
            )
        # Latents have no fixed range, so nothing is clipped; trailing spacing starts at pure noise (tau 0).
        self._ddim: Any = of_diffusers("DDIMScheduler").from_config(scheduler, clip_sample=False, timestep_spacing="trailing")

    @classmethod
    def folder(cls, config: BackboneConfig) -> Path:
        """The local folder of a diffusers pipeline; a hub id is downloaded, a single file converted.

        Raises:
            EnvironmentProblem: there is no such folder or file, or it cannot be loaded or read.
        """
        file = Path(config.path).expanduser()
        if file.suffix != ".safetensors" or not file.is_file():
            return super().folder(config)
        like = getattr(config, "like", "") or cls.path
        return unpack(of_diffusers(cls.pipeline_class), file, like, **dict.fromkeys(cls.unused))

    def spans(self, prompt: str, phrase: str) -> list[range]:
        """Token positions at which `phrase` stands in `prompt` as whole words; the begin token is position 0."""
        return self._spans(prompt, phrase, *self._tokenizer("text_encoder"))

    def text_sites(self) -> list[Site]:
        """The keys and values of every cross-attention."""
        return [Site(name, "tokens") for name in self.lora_targets("kv")]

    def schedule(self, steps: int, size: int | None = None) -> Schedule:
        """The timesteps that DDIM takes under the pipeline's own scheduler config, whatever the size."""
        self._ddim.set_timesteps(steps)
        timesteps = self._ddim.timesteps.clone()
        return Schedule(timesteps=timesteps, tau=ddpm_tau(timesteps, self._ddim.config.num_train_timesteps))

    def latents(self, seeds: Sequence[int], size: int | None = None) -> torch.Tensor:
        """Initial noise (n, 4, h, w), the same as the pipeline draws for CPU generators with these seeds."""
        config = part_config(self._folder, self.prefix)
        side = config["sample_size"] if size is None else self._side(size)
        return self._noise(seeds, (config["in_channels"], side, side))

    @classmethod
    def activations(cls, size: int) -> Activations:
        """What a row takes at 16 bits, for an image of `size` pixels: found with fake tensors at 512, in proportion else."""
        at_512 = Activations(forward=0.065, kept=0.73, checkpointed=0.215, maps=0.18, decode=0.38)
        return Activations(*(gb * (size / 512) ** 2 for gb in at_512))

    @classmethod
    def tflop(cls, size: int) -> float:
        """About how many TFLOP a forward pass of one row is."""
        return 0.8 * (size / 512) ** 2

    def _predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning, guidance: float) -> torch.Tensor:
        """Epsilon (b, 4, h, w); no guidance is built into the model."""
        timestep = ddpm_timestep(tau, self._ddim.config.num_train_timesteps).to(x.device)
        prediction: torch.Tensor = self.denoiser(x, timestep, encoder_hidden_states=cond.tokens, return_dict=False)[0]
        return prediction

    def _share_of(self, x: torch.Tensor) -> float:
        return x.shape[-1] * x.shape[-2] / 64**2

    def step(self, prediction: torch.Tensor, x: torch.Tensor, k: int, schedule: Schedule) -> torch.Tensor:
        """One deterministic step of diffusers' DDIM, from step `k` to the next."""
        if self._ddim.num_inference_steps != len(schedule):
            self._ddim.set_timesteps(len(schedule))
        result: torch.Tensor = self._ddim.step(prediction, int(schedule.timesteps[k]), x, return_dict=False)[0]
        return result

    def to_x0(self, prediction: torch.Tensor, x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """Finished latents x0 = (x - sqrt(1 - a) epsilon) / sqrt(a)."""
        signal, noise = self._rates(x, tau)
        return (x - noise * prediction) / signal

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """Latents x = sqrt(a) x0 + sqrt(1 - a) noise."""
        signal, rate = self._rates(x0, tau)
        return signal * x0 + rate * noise

    def call_arguments(self, cond: Conditioning, *, empty: Conditioning, guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline's call for encoded prompts."""
        given, none = (c.to(self.device, self.dtype) for c in (cond, empty.repeat(len(cond))))
        return {"prompt_embeds": given.tokens, "negative_prompt_embeds": none.tokens, "guidance_scale": guidance}

    def _tokenizer(self, encoder: str) -> tuple[Any, int]:
        tokenizer = self._pipe.tokenizer
        return tokenizer, tokenizer.model_max_length

    def _encode(self, prompt: str) -> Conditioning:
        tokens, _ = self._pipe.encode_prompt(prompt, self._pipe.text_encoder.device, 1, do_classifier_free_guidance=False)
        return Conditioning(tokens=tokens, pooled=None, **self._tokenized(prompt, *self._tokenizer("text_encoder")))

    def _rates(self, x: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(a) and sqrt(1 - a) at `tau`, shaped to multiply `x`."""
        timestep = ddpm_timestep(tau, self._ddim.config.num_train_timesteps).cpu()
        a = per_row(self._ddim.alphas_cumprod[timestep], x)
        return a.sqrt().to(x.dtype), (1 - a).sqrt().to(x.dtype)


class StableDiffusion14(StableDiffusion):
    """SD1.4, the base of most published erasures."""

    name: ClassVar[str] = "sd14"
    path: ClassVar[str] = "CompVis/stable-diffusion-v1-4"
