"""What an attack is handed: an erased model, one concept, and no more than it says it knows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from erasekit.attacks.draw import KNOWS, Draw, Knows
from erasekit.attacks.losses import denoise_loss
from erasekit.backbones.protocol import Backbone, Conditioning, Lexicon, guided
from erasekit.concepts import Concept
from erasekit.erasures.erasure import Erasure
from erasekit.errors import ErasekitError
from erasekit.evaluation.tasks import Prompt, Protocol
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.steering import Steering

ERASURE = "erasure"  # the adapter's name


class ErasedModel:
    """A backbone with an erasure on it, which `base` takes off for a while.

    Attributes:
        ctx: the backbone, the protocol and the concepts.
        erasure: None for the unedited model.
        bank: the erasure's adapter, and those that an attack trains beside it; None without deltas.
        passes: rows that went through the denoiser, those with gradients counted three times.
    """

    def __init__(self, ctx: RunContext, erasure: Erasure | None) -> None:
        """Put the erasure on; `close` takes it off."""
        self.ctx, self.erasure, self.passes = ctx, erasure, 0
        self.bank = AdapterBank(ctx.backbone)
        self.restore()
        self._steering = Steering(ctx, erasure.guidance) if erasure and erasure.guidance else None
        self._base = False

    def restore(self) -> None:
        """Take off all adapters but the erasure's, which is put on if it is off."""
        self.bank.remove()
        if self.erasure and self.erasure.kind == "weights":
            self.bank.add_frozen(ERASURE, self.erasure.total())

    def close(self) -> None:
        """Leave the backbone as it was."""
        self.bank.remove()

    @contextmanager
    def base(self) -> Iterator[None]:
        """The unedited model, all adapters off."""
        steering, self._steering = self._steering, None
        try:
            with self.bank.teacher():
                yield
        finally:
            self._steering = steering

    def predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The conditional prediction, differentiable."""
        self.passes += len(x) * (3 if torch.is_grad_enabled() else 1)
        return self._steering.conditional(x, tau, cond) if self._steering else self.ctx.predict(x, tau, cond)

    def follow(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The guided prediction that sampling follows."""
        ctx, embedded = self.ctx, self.ctx.backbone.embedded_guidance
        self.passes += len(x) * (1 if embedded else 2)
        if self._steering:
            return self._steering.follow(x, tau, cond)
        return guided(ctx.backbone, x, tau, cond, uncond=ctx.backbone.encode([""]), scale=ctx.protocol.guidance)


class Target:
    """An erased model and one concept, as an attack may see them.

    Attributes:
        concept: what is to come back.
        prompts: the task's prompts that ask for it.
        protocol: how images are drawn.
        examples: finished latents (n, ...) of images that show the concept, drawn by the unedited model for the first of the
            prompts, or given by the task.
    """

    def __init__(
        self,
        model: ErasedModel,
        attack: str,
        knows: Knows,
        concept: Concept,
        prompts: Sequence[Prompt],
        examples: Mapping[int, torch.Tensor],
    ) -> None:
        """Of an attack by its name; `examples` are latents (1, ...) by the index of the prompt that they are of."""
        self._model, self._attack, self._knows = model, attack, knows
        self.concept, self.prompts, self._examples = concept, tuple(prompts), dict(examples)

    @property
    def backbone(self) -> Backbone:
        """The model's parts and its schedule; predictions are asked for here, so that they are counted."""
        return self._model.ctx.backbone

    @property
    def protocol(self) -> Protocol:
        """How images are drawn."""
        return self._model.ctx.protocol

    @property
    def ctx(self) -> RunContext:
        """The context of the run, for attacks that train."""
        self._needs("erased")
        return replace(self._model.ctx, concepts=(self.concept,), directory=None)

    @property
    def bank(self) -> AdapterBank:
        """The adapters on the denoiser, for attacks that train one; `restored` takes them off again."""
        self._needs("erased")
        return self._model.bank

    @property
    def erasure(self) -> Erasure | None:
        """The erasure; None on the unedited model."""
        self._needs("erased")
        return self._model.erasure

    @property
    def examples(self) -> torch.Tensor:
        """All images of the concept that there are, as latents (n, ...)."""
        return torch.cat(list(self._examples.values()))

    def example(self, prompt: Prompt) -> torch.Tensor:
        """Latents (1, ...) of an image of the concept: the prompt's own, or another prompt's where that does not show it.

        Raises:
            ErasekitError: there is none.
        """
        if not self._examples:
            raise ErasekitError(f"The unedited model shows '{self.concept.name}' in no image: '{self._attack}' needs one.")
        own = self.prompts.index(prompt)
        nearest = min(self._examples, key=lambda index: (index - own) % len(self.prompts))
        return self._examples[nearest]

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator of its own for each named use and concept."""
        return self._model.ctx.generator(f"{self._attack}/{self.concept.name}/{name}")

    def generator_of(self, prompt: Prompt) -> torch.Generator:
        """A CPU generator of its own for each prompt, whatever was attacked before."""
        digest = hashlib.sha256(f"{prompt.text}/{prompt.seed}".encode()).hexdigest()[:16]
        return self.generator(digest)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode texts, as a user of the model could."""
        return self.backbone.encode(texts)

    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> Draw:
        """Images of texts."""
        return Draw(self.encode(texts), seeds, texts)

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of the text encoders."""
        return self.backbone.encoders

    def tokenize(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The ids that each text encoder reads for prompts."""
        return self.backbone.tokenize(prompts)

    def spell(self, encoder: str, ids: torch.Tensor) -> str:
        """The text of one prompt's ids."""
        return self.backbone.spell(encoder, ids)

    def lexicon(self, encoder: str) -> Lexicon:
        """The tokens of a text encoder."""
        self._needs("text encoder")
        return self.backbone.lexicon(encoder)

    def embed(
        self,
        tokens: Mapping[str, torch.Tensor],
        vectors: Mapping[str, torch.Tensor] | None = None,
        *,
        like: Conditioning | None = None,
    ) -> Conditioning:
        """Encode token ids or vectors, differentiable; see `Backbone.embed`."""
        self._needs("text encoder")
        return self.backbone.embed(tokens, vectors, like=like)

    def predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The erased model's conditional prediction, differentiable."""
        self._needs("erased")
        return self._model.predict(x, tau, cond)

    def follow(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The erased model's guided prediction, which sampling follows."""
        self._needs("erased")
        return self._model.follow(x, tau, cond)

    def loss(self, latent: torch.Tensor, cond: Conditioning, tau: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """How badly the erased model explains an image under a conditioning (see `denoise_loss`)."""
        return denoise_loss(self.backbone, latent, cond, tau, noise, predict=self.predict)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Predictions of the unedited model."""
        self._needs("erased+base")
        with self._model.base():
            yield

    def restore(self) -> None:
        """Take off what an attack has put on the denoiser."""
        self._model.restore()

    def _needs(self, least: Knows) -> None:
        """See that the attack says that it knows as much."""
        if KNOWS.index(self._knows) < KNOWS.index(least):
            raise PermissionError(f"'{self._attack}' knows {self._knows}: what it asks for needs '{least}'.")
