"""Stable Diffusion 1.x: a UNet that predicts epsilon, one CLIP text encoder, text read by 32 cross-attention layers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from torch import nn

from erasekit.backbone import BackboneConfig, Capabilities, Conditioning, Site
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.quiet import quiet
from erasekit.schedule import Schedule, ddpm_tau, ddpm_timestep

_Pipeline: Any = StableDiffusionPipeline  # Any: diffusers is untyped
_DDIM: Any = DDIMScheduler

_SCOPES = {
    "kv": r"\.attn2\.to_[kv]$",
    "cross": r"\.attn2\.",
    "attention": r"\.attn[12]\.",
    "all": r"",
}


class StableDiffusion:
    """A backbone over a `StableDiffusionPipeline`; SD1.5 itself.

    A subclass with a `name`, a `domain` and a `path` of its own is another model of the same class.

    Attributes:
        path: hub id or local folder that is loaded if the config names none.
        source: hub id, or the name of the local folder.
        revision: the commit on the hub, "" for a local folder.
        denoiser: the UNet, in evaluation mode and frozen.
    """

    name: ClassVar[str] = "sd15"
    domain: ClassVar[Literal["natural", "mini"]] = "natural"
    path: ClassVar[str] = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    capabilities: ClassVar[Capabilities] = Capabilities(family="unet", prediction="epsilon", guidance="cfg")
    prefix: ClassVar[str] = "unet"
    Config: ClassVar[type[BackboneConfig]] = BackboneConfig

    def __init__(self, folder: Path, *, source: str, revision: str, device: torch.device, dtype: torch.dtype) -> None:
        """Load the diffusers pipeline in `folder`; use `load` to go from a config.

        Raises:
            EnvironmentProblem: the folder does not hold a Stable Diffusion 1.x pipeline.
        """
        self.source, self.revision, self.device, self.dtype = source, revision, device, dtype
        self._folder = folder
        self._pipe: Any = self.pipeline()
        predicts = self._pipe.scheduler.config.prediction_type
        if predicts != "epsilon":
            raise EnvironmentProblem(f"'{source}' predicts {predicts}; '{self.name}' needs a model that predicts epsilon.")
        self.denoiser: Any = self._pipe.unet
        for part in (self._pipe.unet, self._pipe.vae, self._pipe.text_encoder):
            part.eval().requires_grad_(False)
        self._linears = {n: m for n, m in self.denoiser.named_modules() if isinstance(m, nn.Linear)}
        # Latents have no fixed range, so nothing is clipped; trailing spacing starts at pure noise (tau 0).
        config = self._pipe.scheduler.config
        self._ddim: Any = _DDIM.from_config(config, clip_sample=False, timestep_spacing="trailing")
        self._encoded: dict[str, tuple[torch.Tensor, int]] = {}
        self._fingerprint = ""

    @classmethod
    def load(cls, config: BackboneConfig) -> Self:
        """Load from a local folder or the hub (downloaded once).

        Raises:
            EnvironmentProblem: the weights cannot be had; says why and what to do.
        """
        path = config.path or cls.path
        device = _device(config.device)
        folder = _resolve(path, config.revision)
        if config.dtype != "auto":
            dtype: torch.dtype = getattr(torch, config.dtype)
        else:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        local = Path(path).expanduser().is_dir()
        # A download lies in a folder that is named by its commit.
        source, revision = (folder.name, "") if local else (path, folder.name)
        return cls(folder, source=source, revision=revision, device=device, dtype=dtype)

    def pipeline(self) -> Any:
        """A fresh pipeline of the same base with weights of its own, on the backbone's device, without a safety checker.

        Raises:
            EnvironmentProblem: a file is missing, broken or of another kind of model.
        """
        try:
            with quiet():
                pipe = _Pipeline.from_pretrained(
                    self._folder,
                    dtype=self.dtype,
                    use_safetensors=True,
                    safety_checker=None,
                    feature_extractor=None,
                    image_encoder=None,
                    requires_safety_checker=False,
                )
            pipe.to(self.device)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError, RuntimeError) as error:
            raise EnvironmentProblem(
                f"'{self.source}' could not be loaded as a Stable Diffusion pipeline: {_first_line(error)}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and float32 values of the UNet's tensors on disk.

        Read from the files, so that it is the same whatever type the model was loaded in.
        """
        if not self._fingerprint:
            digest = hashlib.sha256()
            where = _tensor_files(self._folder / "unet")
            for key in sorted(where):
                with safe_open(where[key], "pt") as file:
                    tensor = file.get_tensor(key).float().contiguous()
                digest.update(f"{key}{tuple(tensor.shape)}".encode())
                digest.update(tensor.numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the pipeline's own `encode_prompt`, each once.

        One prompt at a time: what a prompt encodes to must not depend on the batch that it comes in.

        Raises:
            RuntimeError: a prompt is new and the text encoder has been released.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                self._encoded[prompt] = self._encode(prompt)
        if not prompts:
            return self.encode([""])[:0]
        rows = [self._encoded[prompt] for prompt in prompts]
        return Conditioning(
            tokens=torch.cat([tokens for tokens, _ in rows]),
            pooled=None,
            lengths=torch.tensor([length for _, length in rows]),
        )

    def spans(self, prompt: str, phrase: str) -> list[range]:
        """Token positions at which `phrase` stands in `prompt` as whole words; the begin token is position 0."""
        ids = self._ids(prompt)
        wanted = self._pipe.tokenizer(phrase, add_special_tokens=False).input_ids
        starts = range(len(ids) - len(wanted) + 1) if wanted else range(0)
        return [range(i, i + len(wanted)) for i in starts if ids[i : i + len(wanted)] == wanted]

    def text_sites(self) -> list[Site]:
        """The keys and values of every cross-attention."""
        return [Site(name, "tokens") for name in self.lora_targets("kv")]

    def lora_targets(self, scope: str) -> list[str]:
        """Linear layers of a scope: `kv` (cross-attention keys and values), `cross`, `attention` (self too) or `all`.

        Raises:
            UsageError: the scope is unknown or matches nothing.
        """
        if scope not in _SCOPES:
            raise UsageError(f"Unknown scope '{scope}'. '{self.name}' has {', '.join(_SCOPES)}.")
        names = [name for name in self._linears if re.search(_SCOPES[scope], name)]
        if not names:
            raise UsageError(f"Scope '{scope}' matches no layer of '{self.source}'.")
        return names

    def schedule(self, steps: int) -> Schedule:
        """The timesteps that DDIM takes under the pipeline's own scheduler config."""
        self._ddim.set_timesteps(steps)
        timesteps = self._ddim.timesteps.clone()
        return Schedule(timesteps=timesteps, tau=ddpm_tau(timesteps, self._ddim.config.num_train_timesteps))

    def latents(self, seeds: Sequence[int], size: int | None = None) -> torch.Tensor:
        """Initial noise (n, 4, h, w), the same as the pipeline draws for CPU generators with these seeds."""
        side = self.denoiser.config.sample_size if size is None else size // self._pipe.vae_scale_factor
        shape = (len(seeds), self.denoiser.config.in_channels, side, side)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise: torch.Tensor = randn_tensor(shape, generator=generators, device=self.device, dtype=self.dtype)
        return noise

    def predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Epsilon (b, 4, h, w) for latents `x` at progress `tau` (b,)."""
        timestep = ddpm_timestep(tau, self._ddim.config.num_train_timesteps).to(x.device)
        prediction: torch.Tensor = self.denoiser(x, timestep, encoder_hidden_states=cond.tokens, return_dict=False)[0]
        return prediction

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

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Pictures (b, 3, h, w) in [-1, 1]; works for `AutoencoderKL` and `AutoencoderTiny`."""
        vae = self._pipe.vae
        picture: torch.Tensor = vae.decode(x0 / vae.config.scaling_factor, return_dict=False)[0]
        return picture

    def call_arguments(self, cond: Conditioning, *, empty: Conditioning, guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline's call for encoded prompts."""
        return {
            "prompt_embeds": cond.tokens,
            "negative_prompt_embeds": empty.repeat(len(cond)).tokens,
            "guidance_scale": guidance,
        }

    def release(self, part: Literal["text_encoders", "vae", "denoiser"]) -> None:
        """Free the memory of a part: encoded prompts stay, anything else that needs the part fails from here on."""
        name = {"text_encoders": "text_encoder", "vae": "vae", "denoiser": "unet"}[part]
        setattr(self._pipe, name, None)
        if part == "denoiser":
            self.denoiser.to("meta")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt with begin and end, cut at the model's length."""
        tokenizer = self._pipe.tokenizer
        ids: list[int] = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
        return ids

    @torch.no_grad()
    def _encode(self, prompt: str) -> tuple[torch.Tensor, int]:
        if self._pipe.text_encoder is None:
            raise RuntimeError(f"'{prompt}' was not encoded before the text encoder was released.")
        tokens, _ = self._pipe.encode_prompt(prompt, self.device, 1, do_classifier_free_guidance=False)
        return tokens, len(self._ids(prompt))

    def _rates(self, x: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(a) and sqrt(1 - a) at `tau`, shaped to multiply `x`."""
        timestep = ddpm_timestep(tau, self._ddim.config.num_train_timesteps).cpu()
        a = self._ddim.alphas_cumprod[timestep].reshape(-1, *[1] * (x.ndim - 1)).to(x.device)
        return a.sqrt().to(x.dtype), (1 - a).sqrt().to(x.dtype)


class StableDiffusion14(StableDiffusion):
    """SD1.4, the base of most published erasures."""

    name: ClassVar[str] = "sd14"
    path: ClassVar[str] = "CompVis/stable-diffusion-v1-4"


def _device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one.

    Raises:
        EnvironmentProblem: this machine has no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentProblem(
            f"Device '{name}' cannot be used ({_first_line(error)}); 'backbone.device' takes auto, cpu, cuda, cuda:1, mps."
        ) from error


def _resolve(path: str, revision: str | None) -> Path:
    """The local folder of a diffusers pipeline; a hub id is downloaded.

    Raises:
        EnvironmentProblem: there is no such folder, or the download failed.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise EnvironmentProblem(f"'{path}' has no model_index.json; 'backbone.path' needs a diffusers folder or a hub id.")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise EnvironmentProblem(f"There is no folder '{path}'; 'backbone.path' needs a diffusers folder or a hub id.")
    return _download(path, revision)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # Parts that are given (as None) are not downloaded.
        parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        return Path(_Pipeline.download(repo, revision=revision, use_safetensors=True, **parts))
    except GatedRepoError as error:
        raise EnvironmentProblem(
            f"{repo} is gated: accept its licence at huggingface.co/{repo}, then run 'hf auth login'."
        ) from error
    except RevisionNotFoundError as error:
        raise EnvironmentProblem(f"{repo} has no revision '{revision}'; check 'backbone.revision'.") from error
    except RepositoryNotFoundError as error:
        raise EnvironmentProblem(
            f"The hub has no repository '{repo}', or it is private: check the name, or run 'hf auth login'."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"'{repo}' could not be downloaded ({_first_line(error)}). "
            f"Check the network, or give a local folder: -s backbone.path=FOLDER"
        ) from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a model folder, sharded or not, of the main variant."""
    name = "diffusion_pytorch_model"
    paths = sorted(folder.glob(f"{name}-*-of-*.safetensors")) or [folder / f"{name}.safetensors"]
    where: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            where.update(dict.fromkeys(file.keys(), path))
    return where


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
