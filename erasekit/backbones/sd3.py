"""Stable Diffusion 3.5: a flow whose text is read by two CLIPs side by side, and by T5 behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import pad

from erasekit.backbones.folders import part_config
from erasekit.backbones.memory import Activations, Holding
from erasekit.backbones.mmdit import Mmdit
from erasekit.backbones.protocol import BackboneConfig, Capabilities, Conditioning
from erasekit.backbones.schedule import Schedule, flow_sigma, flow_tau

CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


class StableDiffusion35Large(Mmdit):
    """SD3.5 large.

    The tokens of both CLIPs stand side by side, filled up with zeros to the width of T5, and T5's tokens stand behind them:
    the denoiser reads a prompt twice. `pooled` is the summaries of both CLIPs, side by side.
    """

    name: ClassVar[str] = "sd35-large"
    path: ClassVar[str] = "stabilityai/stable-diffusion-3.5-large"
    licence: ClassVar[Mapping[str, str]] = {"license": "other", "license_name": "stabilityai-ai-community"}
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="dit", prediction="velocity", guidance="cfg", text="bidirectional"
    )
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    encoders: ClassVar[tuple[str, ...]] = (*CLIPS, T5)
    reads: ClassVar[Mapping[str, Literal["tokens", "pooled"]]] = dict.fromkeys((*CLIPS, T5), "tokens")
    size: ClassVar[int] = 1024
    positions: ClassVar[int] = 256
    clip: ClassVar[int] = 77
    measured: ClassVar[tuple[int, int, Activations]] = (
        1024,
        333,
        Activations(forward=0.256, kept=12.8, checkpointed=1.27, maps=150.0, decode=1.55),
    )
    tflops: ClassVar[tuple[float, float, float]] = (5.395e-3, 5.323e-3, 3.697e-7)
    sampling: ClassVar[Mapping[str, Any]] = {"sampler": "default", "steps": 28, "guidance": 3.5, "size": size}
    holding: ClassVar[Mapping[int, Holding]] = {
        8: Holding(1, "offload", "cpu", checkpointing=True, slicing=True),
        12: Holding(1, "nf4", "cpu", checkpointing=True, slicing=True),
        16: Holding(2, "nf4", "released", checkpointing=True, slicing=True),
        24: Holding(4, "nf4", "released", checkpointing=True, slicing=True),
        32: Holding(4, "whole", "released", checkpointing=True, slicing=True),
        48: Holding(8, "whole", "released", checkpointing=True),
        80: Holding(8, "whole", "kept", checkpointing=True),
        141: Holding(16, "whole", "kept"),
    }
    on_cpu: ClassVar[Holding] = Holding(1, "whole", "released", checkpointing=True)
    sizes_gb: ClassVar[tuple[float, float, float]] = (15.2, 10.4, 0.16)
    architecture: ClassVar[tuple[str, Mapping[str, Any]]] = (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    )

    def __init__(self, folder: Path, config: BackboneConfig, **where: Any) -> None:
        """See `PipelineBackbone`."""
        super().__init__(folder, config, **where)
        self._front = self._pipe.tokenizer.model_max_length
        self._length = min(self.positions, self._pipe.tokenizer_3.model_max_length)

    def spans(self, prompt: str, phrase: str) -> list[range]:
        """Positions at which `phrase` stands in `prompt` as whole words, of CLIP's tokens and then of T5's behind them."""
        behind = self._spans(prompt, phrase, *self._tokenizer(T5))
        front = self._spans(prompt, phrase, *self._tokenizer(CLIPS[0]))
        return [*front, *(range(self._front + span.start, self._front + span.stop) for span in behind)]

    def schedule(self, steps: int, size: int | None = None) -> Schedule:
        """The steps of the pipeline's own scheduler."""
        scheduler = self._pipe.scheduler
        scheduler.set_timesteps(steps, mu=self._shift(size) if scheduler.config.use_dynamic_shifting else None)
        return Schedule(timesteps=scheduler.timesteps.clone(), tau=flow_tau(scheduler.sigmas[:-1]))

    def latents(self, seeds: Sequence[int], size: int | None = None) -> torch.Tensor:
        """Initial noise (n, channels, h, w), the same as the pipeline draws for CPU generators with these seeds."""
        side = 2 * self._tokens(size)
        return self._noise(seeds, (self._channels, side, side))

    @classmethod
    def tflop(cls, size: int) -> float:
        """About how many TFLOP a forward pass of one row is: of image tokens, of text tokens, and of pairs of tokens."""
        image, text = (size // 16) ** 2, cls.clip + cls.positions
        return sum(n * each for n, each in zip((image, text, (image + text) ** 2), cls.tflops, strict=True))

    def embed(
        self,
        tokens: Mapping[str, torch.Tensor],
        vectors: Mapping[str, torch.Tensor] | None = None,
        *,
        like: Conditioning | None = None,
    ) -> Conditioning:
        """Encode token ids, differentiable in `vectors`; see `Backbone`. CLIP's states before the last layer count."""
        found = None if like is None else like.to(self.device, self.dtype)
        sides, summaries, ids, lengths = self._taken_apart(found)
        for name, given in tokens.items():
            clip = name in CLIPS
            out = self._read(name, given, vectors, **({"output_hidden_states": True} if clip else {}))
            sides[name] = (out.hidden_states[-2] if clip else out.last_hidden_state).to(self.device, self.dtype)
            if clip:
                summaries[name] = out.text_embeds.to(self.device, self.dtype)
            if name != CLIPS[1]:  # whose ids differ from the first one's in pads alone
                ids[name] = given.cpu()
                lengths[name] = (ids[name] == self._tokenizer(name)[0].eos_token_id).int().argmax(1) + 1
        front = torch.cat([sides[name] for name in CLIPS], -1)
        front = pad(front, (0, sides[T5].shape[-1] - front.shape[-1]))
        pooled = torch.cat([summaries[name] for name in CLIPS], -1)
        return self._behind(torch.cat([front, sides[T5]], 1), pooled, ids, lengths)

    def call_arguments(self, cond: Conditioning, *, empty: Conditioning, guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline's call for encoded prompts."""
        return self._given(cond, empty, negative=True) | {"guidance_scale": guidance}

    def _predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning, guidance: float) -> torch.Tensor:
        """Velocity (b, channels, h, w); no guidance is built into the model."""
        velocity: torch.Tensor = self.denoiser(
            hidden_states=x,
            timestep=(flow_sigma(tau) * self._pipe.scheduler.config.num_train_timesteps).float().to(x.device),
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]
        return velocity

    def _tokens_of(self, x: torch.Tensor) -> int:
        return x.shape[-1] * x.shape[-2] // 4

    def _tokenizer(self, encoder: str) -> tuple[Any, int]:
        if encoder == T5:
            return self._pipe.tokenizer_3, self._length
        return (self._pipe.tokenizer if encoder == CLIPS[0] else self._pipe.tokenizer_2), self._front

    def _encode(self, prompt: str) -> Conditioning:
        tokens, _, pooled, _ = self._pipe.encode_prompt(
            prompt,
            None,
            None,
            self._pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._length,
        )
        read = {name: self._tokenized(prompt, *self._tokenizer(name)) for name in (CLIPS[0], T5)}
        ids, lengths = ({name: each[key] for name, each in read.items()} for key in ("ids", "lengths"))
        return self._behind(tokens, pooled, ids, lengths)

    def _behind(
        self,
        tokens: torch.Tensor,
        pooled: torch.Tensor,
        ids: Mapping[str, torch.Tensor],
        lengths: Mapping[str, torch.Tensor],
    ) -> Conditioning:
        """Prompts that are read twice, given ids and lengths of both readings."""
        first = lengths[CLIPS[0]]
        before = torch.stack([first, torch.full_like(first, self._front)], 1)
        return Conditioning(tokens, pooled, torch.cat([ids[CLIPS[0]], ids[T5]], 1), self._front + lengths[T5], before)

    def _taken_apart(self, cond: Conditioning | None) -> tuple[dict[str, torch.Tensor], ...]:
        """What each encoder made of prompts: tokens, CLIPs' summaries, and of the two readings ids and lengths."""
        if cond is None:
            return {}, {}, {}, {}
        assert cond.pooled is not None
        front, behind = cond.readings()
        configs = [part_config(self._folder, name) for name in CLIPS]
        widths = [config["hidden_size"] for config in configs]
        sides = dict(zip(CLIPS, front.tokens[..., : sum(widths)].split(widths, -1), strict=True))
        summaries = dict(zip(CLIPS, cond.pooled.split([config["projection_dim"] for config in configs], -1), strict=True))
        both = {CLIPS[0]: front, T5: behind}
        ids, lengths = ({name: getattr(read, key) for name, read in both.items()} for key in ("ids", "lengths"))
        return sides | {T5: behind.tokens}, summaries, ids, lengths


class StableDiffusion35Medium(StableDiffusion35Large):
    """SD3.5 medium; in half of its layers the image attends to itself a second time."""

    name: ClassVar[str] = "sd35-medium"
    path: ClassVar[str] = "stabilityai/stable-diffusion-3.5-medium"
    measured: ClassVar[tuple[int, int, Activations]] = (
        1024,
        333,
        Activations(forward=0.175, kept=6.6, checkpointed=0.62, maps=60.0, decode=1.55),
    )
    tflops: ClassVar[tuple[float, float, float]] = (1.605e-3, 1.334e-3, 2.15e-7)
    sampling: ClassVar[Mapping[str, Any]] = {
        "sampler": "default",
        "steps": 40,
        "guidance": 4.5,
        "size": StableDiffusion35Large.size,
    }
    holding: ClassVar[Mapping[int, Holding]] = {
        8: Holding(1, "nf4", "cpu", checkpointing=True, slicing=True),
        12: Holding(2, "whole", "cpu", checkpointing=True, slicing=True),
        16: Holding(4, "whole", "released", checkpointing=True, slicing=True),
        24: Holding(8, "whole", "released", checkpointing=True),
        32: Holding(8, "whole", "released", checkpointing=True),
        48: Holding(16, "whole", "kept", checkpointing=True),
        80: Holding(16, "whole", "kept", checkpointing=True),
        141: Holding(32, "whole", "kept"),
    }
    sizes_gb: ClassVar[tuple[float, float, float]] = (4.6, 10.4, 0.16)
    architecture: ClassVar[tuple[str, Mapping[str, Any]]] = (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    )
