"""What erasekit asks of a text-to-image model. Everything else is free functions over this protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, field_validator
from torch import nn

from erasekit.backbones.memory import Needs
from erasekit.backbones.schedule import Schedule
from erasekit.settings import Settings


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        tokens: (n, length, width), what the denoiser reads per token, pads included.
        pooled: (n, width) where the model reads a summary too (FLUX), else None.
        ids: (n, length) the token of each position.
        lengths: (n,) how many tokens each prompt has, begin and end tokens included; the others are pads, after what a chat
            template has behind a prompt (FLUX.2), which is the same for all.
        before: (n, 2) where a model reads a prompt twice, one reading behind the other (SD3: T5's behind CLIP's): how many
            tokens the first has, and how many positions. `lengths` is then the position at which the second's pads begin.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor | None
    ids: torch.Tensor
    lengths: torch.Tensor
    before: torch.Tensor | None = None

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Conditioning:
        """The prompts at `index` (a slice, a list or a tensor of indices)."""
        return self._map(lambda t: t[index])

    def readings(self) -> list[Conditioning]:
        """The prompts as each reading has them, in the order in which they stand; most models have one, and these are they."""
        if self.before is None:
            return [self]
        k = int(self.before[0, 1])
        first = Conditioning(self.tokens[:, :k], self.pooled, self.ids[:, :k], self.before[:, 0])
        return [first, Conditioning(self.tokens[:, k:], self.pooled, self.ids[:, k:], self.lengths - k)]

    def repeat(self, n: int) -> Conditioning:
        """A single prompt `n` times, without copying."""
        return self._map(lambda t: t.expand(n, *t.shape[1:]))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """Move the embeddings to a device and a floating type; ids and lengths stay where they are, on the CPU."""
        return self._map(lambda t: t.to(device, dtype) if t.is_floating_point() else t)

    def _map(self, function: Any) -> Conditioning:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: None if v is None else function(v) for k, v in values.items()}
        return replace(self, **changed)


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """The prompts of all parts, in order."""
    pooled = [p.pooled for p in parts if p.pooled is not None]
    before = [p.before for p in parts if p.before is not None]
    return Conditioning(
        tokens=torch.cat([p.tokens for p in parts]),
        pooled=torch.cat(pooled) if pooled else None,
        ids=torch.cat([p.ids for p in parts]),
        lengths=torch.cat([p.lengths for p in parts]),
        before=torch.cat(before) if before else None,
    )


@dataclass(frozen=True)
class Lexicon:
    """The tokens of one text encoder.

    Attributes:
        vectors: (tokens, width), what the encoder reads for each token.
        usable: (tokens,) whether somebody can type it: no begin, end, pad or unknown token.
        begin: how many tokens stand before the first word of every prompt.
        end: the id of the token after the last word.
        pad: the id of the tokens after that.
        spaced: whether a token says if a space stands before its word (byte-pair encoding), so that a text has other tokens
            at the beginning of a prompt.
    """

    vectors: torch.Tensor
    usable: torch.Tensor
    begin: int
    end: int
    pad: int
    spaced: bool = False


@dataclass(frozen=True)
class Site:
    """A linear layer that reads raw text embeddings.

    Attributes:
        name: the module's path in the denoiser.
        reads: which field of Conditioning it is given.
    """

    name: str
    reads: Literal["tokens", "pooled"]


@dataclass(frozen=True)
class Capabilities:
    """What a backbone is, for checking a method's needs before anything is loaded.

    Attributes:
        family: architecture of the denoiser.
        prediction: the form of its output.
        guidance: `cfg` (a second, unconditional pass) or `embedded` (distilled into the model).
        text: how the encoder of the tokens attends. `causal` (CLIP, Qwen3): a token knows what stands before it, so that after
            a phrase every token, the end and the pads carry it, and none before it does. `bidirectional` (T5): every word
            of a prompt knows all others. Of two readings this is the last one's.
    """

    family: Literal["unet", "dit"]
    prediction: Literal["epsilon", "velocity"]
    guidance: Literal["cfg", "embedded"]
    text: Literal["causal", "bidirectional"]

    def names(self) -> frozenset[str]:
        """The set that a method's `requires` is compared with."""
        return frozenset(getattr(self, f.name) for f in fields(self))


class BackboneConfig(Settings):
    """Where a backbone comes from and how it is held."""

    path: str = Field("", description="hub id or local diffusers folder; empty means the backbone's own")
    revision: str | None = Field(None, description="revision on the hub")
    device: str = Field("auto", description="torch device; auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the weights; auto is float32 on a CPU"
    )
    vram: Literal["auto", "8", "12", "16", "24", "32", "48", "80", "141"] = Field(
        "auto", description="GPU memory in GB to get along with; auto takes what the GPU has"
    )

    @field_validator("vram", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """TOML and `-s` read 24 as a number."""
        return str(value) if isinstance(value, int) else value


@runtime_checkable
class Backbone(Protocol):
    """A text-to-image model. `x` are latents (b, ...) as the denoiser takes them, `tau` is progress (b,) in [0, 1]."""

    name: ClassVar[str]
    domain: ClassVar[Literal["natural", "mini"]]
    capabilities: ClassVar[Capabilities]
    prefix: ClassVar[str]  # the denoiser's name in the pipeline: "unet" or "transformer"
    encoders: ClassVar[tuple[str, ...]]  # the names of the text encoders in the pipeline
    reads: ClassVar[Mapping[str, Literal["tokens", "pooled"]]]  # which field of a Conditioning each of them fills
    Config: ClassVar[type[BackboneConfig]]
    sampling: ClassVar[Mapping[str, Any]]  # settings of a task's protocol that are other ones on this backbone

    source: str  # hub id, or the name of the local folder: what an erasure says it was made for
    revision: str  # the commit on the hub, "" for a local folder
    device: torch.device
    dtype: torch.dtype
    vram_gb: int  # the size of GPU that it is held for

    @classmethod
    def weights_gb(cls, config: BackboneConfig) -> float:
        """About how many GB of weights are held at once under these settings; nothing is loaded or downloaded for it."""

    @classmethod
    def needs(cls, config: BackboneConfig, size: int) -> Needs:
        """What the model takes under these settings for images of `size` pixels; nothing is loaded for it."""

    @classmethod
    def linears(cls, config: BackboneConfig, scope: str = "all") -> dict[str, int]:
        """The denoiser's linear layers (of a scope) and how many weights each has; nothing is loaded for it."""

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer, frozen and in evaluation mode; loaded when it is first used."""

    @property
    def embedded_guidance(self) -> bool:
        """Whether a guidance scale is an input of the model; if not, guidance takes a second, unconditional prediction."""

    @classmethod
    def load(cls, config: BackboneConfig) -> Backbone:
        """Load the parts.

        Raises:
            EnvironmentProblem: the weights cannot be loaded; says why and what to do.
        """

    def weight(self, module: str) -> torch.Tensor:
        """The weight of one linear layer (out, in), without loading the denoiser for it."""

    def fingerprint(self, modules: Sequence[str] | None = None) -> str:
        """SHA-256 over the weights of some layers: an erasure of them fits two bases if this is equal. None: over all."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the pipeline's own encoders, once each; what is encoded lies on the CPU.

        Raises:
            ErasekitError: a new prompt comes after the encoders have made room for the denoiser.
        """

    def expect(self, texts: Callable[[], Sequence[str]]) -> None:
        """Encode these prompts too, if and when the text encoders have to make room for the denoiser."""

    def tokenize(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The ids (n, length) that each text encoder reads for prompts, pads included, by the encoder's name; on the CPU."""

    def lexicon(self, encoder: str) -> Lexicon:
        """The tokens of a text encoder."""

    def spell(self, encoder: str, ids: torch.Tensor) -> str:
        """The text of one prompt's ids (length,) without begin, end and pad tokens."""

    def embed(
        self,
        tokens: Mapping[str, torch.Tensor],
        vectors: Mapping[str, torch.Tensor] | None = None,
        *,
        like: Conditioning | None = None,
    ) -> Conditioning:
        """Encode token ids, differentiable in `vectors`, on the device; the text encoders come back for it if they are gone.

        For the ids of `tokenize` this is what `encode` gives.

        Args:
            tokens: {encoder: ids (n, length)}.
            vectors: {encoder: (n, length, width)}, read in place of the rows of the encoder's table of tokens. The ids then
                only say where a prompt ends.
            like: encoded prompts that the parts of encoders without tokens are taken from.
        """

    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        """Finished latents x0 (n, ...) of images (n, 3, h, w) in [-1, 1], as the denoiser takes them."""

    def spans(self, prompt: str, phrase: str) -> list[range]:
        """Token positions at which `phrase` stands in `prompt`, in all readings."""

    def vocabulary(self, near: str, n: int) -> list[str]:
        """The `n` whole words that the text encoder has tokens of their own for and holds nearest to the words of a text."""

    def summaries(self, prompts: Sequence[str]) -> torch.Tensor:
        """What the text encoder that `vocabulary` asks makes of each prompt as a whole, (n, width), float64."""

    def text_sites(self) -> list[Site]:
        """The linear layers through which text enters the denoiser."""

    def lora_targets(self, scope: str) -> list[str]:
        """Paths of the linear layers of a named scope.

        Raises:
            UsageError: the scope is unknown or matches nothing.
        """

    def schedule(self, steps: int, size: int | None = None) -> Schedule:
        """The sampler's steps for images of `size` pixels (the model's own size, if left out)."""

    def latents(self, seeds: Sequence[int], size: int | None = None) -> torch.Tensor:
        """Initial noise, one image per seed; the same as the pipeline draws for a generator with that seed."""

    def rows(self, x: torch.Tensor) -> int:
        """The most rows like those of `x` that are predicted at once without gradients."""

    def predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning, *, guidance: float = 1.0) -> torch.Tensor:
        """The denoiser's own prediction (epsilon or velocity), differentiable, on the device of `x`.

        Without gradients it goes through the denoiser in chunks of at most `rows`. All may lie on the CPU.
        `guidance` is the scale that a model with embedded guidance is told; other models have no use for it.
        """

    def step(self, prediction: torch.Tensor, x: torch.Tensor, k: int, schedule: Schedule) -> torch.Tensor:
        """One step of the sampler, from step `k` of the schedule to the next."""

    def to_x0(self, prediction: torch.Tensor, x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """The finished latents that a prediction implies."""

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """Latents at progress `tau` on the way from `noise` to `x0`."""

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, h, w) in [-1, 1], differentiable."""

    def pipeline(self, *, encoders: bool = True, shared: bool = False) -> Any:
        """A fresh, unmodified diffusers pipeline of the same base, with its own weights; without text encoders if so told.

        A `shared` one has the backbone's own denoiser and VAE, so that there is one copy of them.
        """

    def unchanged(self) -> bool:
        """Whether the denoiser, if it is loaded, still is what was loaded: the same tensors, with the same bits."""

    def renew(self) -> None:
        """Be as if just loaded, for another run: a denoiser that was changed is loaded anew, and prompts can be encoded."""

    def call_arguments(self, cond: Conditioning, *, empty: Conditioning, guidance: float) -> dict[str, Any]:
        """Keyword arguments that give the pipeline already encoded prompts and a guidance scale.

        `empty` is the encoded empty prompt (one row), for pipelines with a second, unconditional pass.
        """

    def release(self, part: Literal["text_encoders", "vae", "denoiser"]) -> None:
        """Free the memory of a part that is not needed any more."""


# (x, tau, cond) -> a prediction
Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


def guided(
    backbone: Backbone,
    x: torch.Tensor,
    tau: torch.Tensor,
    cond: Conditioning,
    *,
    uncond: Conditioning,
    scale: float,
    predict: Predict | None = None,
) -> torch.Tensor:
    """A guided prediction: the model's own if it has embedded guidance, else f(x, 0) + scale (f(x, c) - f(x, 0)).

    Both passes of classifier-free guidance run in one batch. `predict` stands in for the backbone's own prediction (a
    student's, which is told a scale if it takes one).
    """
    f = predict or partial(backbone.predict, guidance=scale)
    if backbone.embedded_guidance:
        return f(x, tau, cond)
    both = concatenate([uncond.repeat(len(x)) if len(uncond) == 1 else uncond, cond])
    empty, full = f(torch.cat([x, x]), torch.cat([tau, tau]), both).chunk(2)
    return empty + scale * (full - empty)
