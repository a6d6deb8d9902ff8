"""What FLUX.1 and Stable Diffusion 3.5 share: a transformer of joint attention that predicts a flow's velocity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from erasekit.backbones.folders import part_config
from erasekit.backbones.memory import Activations
from erasekit.backbones.pipelines import PipelineBackbone
from erasekit.backbones.protocol import Conditioning, Site
from erasekit.backbones.schedule import Schedule, flow_sigma, per_row


class Mmdit(PipelineBackbone):
    """A rectified flow: x = (1 - sigma) x0 + sigma noise. An image token is a patch of 2 x 2 latent pixels.

    If both text sites give the same for two prompts, the whole forward does, at every step: text enters nowhere else.

    Attributes:
        size: of an image in pixels, where none is asked for.
        positions: of a prompt that T5 reads.
        clip: of a prompt that CLIP reads, where these stand before T5's.
        measured: pixels, text tokens, and what a row takes there at 16 bits, found with fake tensors.
    """

    prefix: ClassVar[str] = "transformer"
    unused: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")
    scopes: ClassVar[Mapping[str, str]] = {
        "add_kv": r"^transformer_blocks\.\d+\.attn\.add_[kv]_proj$",
        "add_qk": r"^transformer_blocks\.\d+\.attn\.add_[qk]_proj$",
        "qk_dual": r"^transformer_blocks\.\d+\.attn\.(add_[qk]_proj|to_[qk])$",
        "all_attn": r"\.attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
        "all": r"",
        "text": r"^(context_embedder|time_text_embed\.text_embedder\.linear_1)$",
    }
    size: ClassVar[int]
    positions: ClassVar[int]
    clip: ClassVar[int] = 0
    measured: ClassVar[tuple[int, int, Activations]]
    size_step: ClassVar[int] = 16
    cpu_dtype: ClassVar[torch.dtype] = torch.bfloat16

    def text_sites(self) -> list[Site]:
        """The two entrances of text. Their biases are not part of an edit."""
        return [Site("context_embedder", "tokens"), Site("time_text_embed.text_embedder.linear_1", "pooled")]

    @classmethod
    def activations(cls, size: int) -> Activations:
        """What a row takes at 16 bits, for an image of `size` pixels.

        Other sizes than the measured one are in proportion to all tokens, maps to the image's tokens times all.
        """
        at, text, found = cls.measured
        here, there = (size / 16) ** 2, (at / 16) ** 2
        share = (here + cls.clip + cls.positions) / (there + text)
        shares = (share, share, share, share * here / there, here / there)
        return Activations(*(gb * each for gb, each in zip(found, shares, strict=True)))

    def _share_of(self, x: torch.Tensor) -> float:
        at, text, _ = self.measured
        return (self._tokens_of(x) + self.clip + self.positions) / ((at // 16) ** 2 + text)

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

    def _given(self, cond: Conditioning, empty: Conditioning, *, negative: bool) -> dict[str, Any]:
        """Arguments of the pipeline's call for encoded prompts, without a guidance scale."""
        cond, none = (c.to(self.device, self.dtype) for c in (cond, empty.repeat(len(cond))))
        given = {"prompt_embeds": cond.tokens, "pooled_prompt_embeds": cond.pooled}
        if negative:
            given |= {"negative_prompt_embeds": none.tokens, "negative_pooled_prompt_embeds": none.pooled}
        return given

    def _tokens_of(self, x: torch.Tensor) -> int:
        """Image tokens of latents."""
        raise NotImplementedError

    @property
    def _channels(self) -> int:
        channels: int = part_config(self._folder, self.prefix)["in_channels"]
        return channels

    def _tokens(self, size: int | None) -> int:
        """Image tokens along a side."""
        return self._side(size or self.size) // 2

    def _shift(self, size: int | None) -> float:
        """How far a scheduler of dynamic shifting moves its steps towards noise: by the number of image tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self._pipe.scheduler.config
        limits = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        return float(calculate_shift(self._tokens(size) ** 2, *limits))
