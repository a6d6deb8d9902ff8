"""Erasures that act while an image is drawn: no weight changes, and whoever leaves them out has the base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from erasekit.backbones.protocol import Backbone, Conditioning
from erasekit.backbones.schedule import ddpm_tau, flow_tau
from erasekit.concepts import Concept
from erasekit.documents import Damaged, read_document
from erasekit.erasures.manifest import ADVICE, PROMPTS, SETTINGS, Name
from erasekit.errors import UsageError
from erasekit.safety import reject_unsafe
from erasekit.texts import Lines

_ModelHook: Any = ModelHook  # Any: diffusers is untyped
NAME = "erasekit"  # of the hook on a denoiser
Prediction = Literal["none", "wanted", "concept"]


@dataclass(frozen=True)
class Guidance:
    """How predictions are combined at every step.

    Attributes:
        scheme: the registered component of the slot `guidance` that does it.
        settings: what the component is built with, plain data.
        texts: the empty prompt and the text that is steered away from.
        prompts: both, encoded: two rows.
        scale: where a model's guidance is embedded, and so no second pass is drawn by the pipeline: the scale of the
            classifier-free guidance between the two predictions that the scheme gives.
    """

    scheme: str
    settings: Mapping[str, Any]
    texts: tuple[str, str]
    prompts: Conditioning
    scale: float = 1.0

    @classmethod
    def away_from(
        cls,
        backbone: Backbone,
        concepts: Sequence[Concept],
        text: str,
        *,
        scheme: str,
        settings: Mapping[str, Any],
        scale: float = 1.0,
    ) -> Guidance:
        """Encode a text that is steered away from (if it is empty the phrases of all concepts), and the empty prompt.

        Raises:
            UsageError: the text is one that erasekit refuses.
        """
        text = away_text(concepts, text)
        reject_unsafe([text])
        return cls(scheme, settings, ("", text), backbone.encode(["", text]), scale)

    def write(self, folder: Path) -> dict[str, str]:
        """Write the settings and the encoded prompts; the files' SHA-256 by name."""
        record = {
            "schema_version": 1,
            "scheme": self.scheme,
            "settings": self.settings,
            "texts": self.texts,
            "scale": self.scale,
        }
        Record.model_validate(record)  # what could not be read again is not written
        (folder / SETTINGS).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        tensors = {name: t.cpu().contiguous() for name, t in vars(self.prompts).items() if t is not None}
        save_file(tensors, folder / PROMPTS)
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (SETTINGS, PROMPTS)}

    @classmethod
    def read(cls, folder: Path) -> Guidance:
        """What `write` wrote.

        Raises:
            EnvironmentProblem: a file is damaged.
            UsageError: a text is one that erasekit refuses.
        """
        record = read_document(Record, folder / SETTINGS, advice=ADVICE)
        reject_unsafe(record.texts)
        try:
            tensors = load_file(folder / PROMPTS)
        except SafetensorError as error:
            raise Damaged(f"'{folder / PROMPTS}' is damaged ({error}). {ADVICE}") from error
        if fault := _fault(tensors):
            raise Damaged(f"'{folder / PROMPTS}' is damaged: {fault}. {ADVICE}")
        prompts = Conditioning(tensors["tokens"], tensors.get("pooled"), tensors["ids"], tensors["lengths"])
        return cls(record.scheme, record.settings, record.texts, prompts, record.scale)


class Record(BaseModel):
    """The content of guidance.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1]
    scheme: Name
    settings: dict[str, Any]
    texts: tuple[Lines, Lines]
    scale: float


def _fault(tensors: Mapping[str, torch.Tensor]) -> str:
    """What is wrong with two encoded prompts, "" if nothing is."""
    sides = {"tokens": 3, "pooled": 2, "ids": 2, "lengths": 1}
    if not {"tokens", "ids", "lengths"} <= tensors.keys() <= sides.keys():
        return "it does not hold two encoded prompts"
    for name, tensor in tensors.items():
        floating = name in ("tokens", "pooled")
        if tensor.ndim != sides[name] or len(tensor) != 2 or tensor.is_floating_point() != floating:
            return f"'{name}' is no part of two encoded prompts"
        if not tensor.isfinite().all():
            return f"'{name}' holds values that are not finite"
    if tensors["ids"].shape != tensors["tokens"].shape[:2]:
        return "'ids' and 'tokens' have different lengths"
    return ""


def away_text(concepts: Sequence[Concept], text: str) -> str:
    """The text that is steered away from; if it is empty the phrases of all concepts."""
    return text or ", ".join(phrase for concept in concepts for phrase in concept.phrases)


@dataclass(frozen=True)
class Step:
    """What a scheme is given at a step of sampling.

    Attributes:
        predict: the denoiser's predictions (b, ...) for the empty prompt (`none`), what the user asks for (`wanted`; for
            `none` the user's negative prompt counts) and the `concept`: those that are named, in one batch.
        tau: progress.
        memory: a scheme's own, empty at the first step of an image.
    """

    predict: Callable[..., tuple[torch.Tensor, ...]]
    tau: float
    memory: dict[str, torch.Tensor]


class Scheme(Protocol):
    """What is registered in the slot `guidance`: built with its settings, called at every step."""

    def __call__(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """What takes the place of the unconditional and of the conditional prediction in classifier-free guidance."""


def attach(pipe: Any, guidance: Guidance, scheme: Scheme, *, embedded: bool = True, strength: float = 1.0) -> None:
    """Put a scheme into a pipeline, as a diffusers hook on its denoiser; one that is there is replaced.

    Args:
        pipe: a Stable Diffusion or FLUX.1 pipeline.
        guidance: its prompts and its scale.
        scheme: built with its settings.
        embedded: a FLUX pipeline is called without true classifier-free guidance, as usual.
        strength: how far predictions go from the base's (0) to the scheme's (1), and beyond.
    """
    detach(pipe)
    if strength == 0:
        return
    hook: Any = UnetHook(guidance, scheme, pipe) if hasattr(pipe, "unet") else FluxHook(guidance, scheme, embedded=embedded)
    hook.strength = strength
    HookRegistry.check_if_exists_or_initialize(denoiser_of(pipe)).register_hook(hook, NAME)


def detach(pipe: Any) -> None:
    """Take a scheme out of a pipeline, which then is the base's again."""
    HookRegistry.check_if_exists_or_initialize(denoiser_of(pipe)).remove_hook(NAME, recurse=False)


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a Stable Diffusion or FLUX.1 pipeline."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


class SteeringHook(_ModelHook):  # type: ignore[misc]
    """What the hooks of both kinds of denoisers share: the scheme, and knowing where an image begins."""

    def __init__(self, guidance: Guidance, scheme: Scheme) -> None:
        """Start before an image."""
        super().__init__()
        self.guidance, self.scheme = guidance, scheme
        self._memory: dict[str, torch.Tensor] = {}
        self._last = 1.0
        self.strength = 1.0

    def steer(self, tau: float, predict: Callable[..., tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The scheme's predictions; its memory is emptied where progress falls back: there the next image begins."""
        if tau <= self._last:
            self._memory = {}
        self._last = tau
        return self.scheme(Step(predict, tau, self._memory))

    def pair(self, tau: float, predict: Callable[..., tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """The scheme's two predictions, as far from the base's own as the strength says."""
        steered = self.steer(tau, predict)
        if self.strength == 1:
            return steered
        return tuple(torch.lerp(own, new, self.strength) for own, new in zip(predict("none", "wanted"), steered, strict=True))


class UnetHook(SteeringHook):
    """On a UNet, which a pipeline calls once a step with the rows [unconditional, conditional]."""

    def __init__(self, guidance: Guidance, scheme: Scheme, pipe: Any) -> None:
        """The pipeline says how it calls."""
        super().__init__(guidance, scheme)
        self._pipe = pipe

    def new_forward(self, module: Any, x: torch.Tensor, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        """The scheme's two predictions in the place of the denoiser's."""
        if not self._pipe.do_classifier_free_guidance:
            raise UsageError(
                "This erasure steers classifier-free guidance, which is off. Sample with a guidance scale above 1."
            )
        n = len(x) // 2
        own = self.guidance.prompts[[1]].repeat(n).to(x.device, x.dtype)
        given = {"none": encoder_hidden_states[:n], "wanted": encoder_hidden_states[n:], "concept": own.tokens}
        added = kwargs.pop("added_cond_kwargs", None) or {}  # SDXL's
        if added:
            summaries = added["text_embeds"]
            summary = {"none": summaries[:n], "wanted": summaries[n:], "concept": _summary(own, summaries.shape[-1])}

        def predict(*names: Prediction) -> tuple[torch.Tensor, ...]:
            embeddings, latents = torch.cat([given[name] for name in names]), torch.cat([x[:n]] * len(names))
            if added:
                sizes = torch.cat([added["time_ids"][:n]] * len(names))
                kwargs["added_cond_kwargs"] = {"text_embeds": torch.cat([summary[name] for name in names]), "time_ids": sizes}
            found = self.fn_ref.original_forward(latents, timestep, encoder_hidden_states=embeddings, **kwargs)
            return tuple(found[0].chunk(len(names)))

        tau = float(ddpm_tau(torch.as_tensor(timestep), self._pipe.scheduler.config.num_train_timesteps))
        return (torch.cat(self.pair(tau, predict)),)


def _summary(cond: Conditioning, width: int) -> torch.Tensor:
    """The summary of a prompt without the zeros that SDXL's backbone puts behind it."""
    assert cond.pooled is not None
    return cond.pooled[:, :width]


class FluxHook(SteeringHook):
    """On a FLUX transformer, which a pipeline calls once a step; with true guidance twice, the conditional one first."""

    reads: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "tokens", "pooled_projections": "pooled"}

    def __init__(self, guidance: Guidance, scheme: Scheme, *, embedded: bool) -> None:
        """`embedded`: the pipeline calls once a step."""
        super().__init__(guidance, scheme)
        self._embedded = embedded
        self._none: torch.Tensor | None = None

    def new_forward(self, module: Any, **kwargs: Any) -> Any:
        """The scheme's two predictions, combined here; with true guidance the pipeline asks for each and combines them."""
        x, tau = kwargs["hidden_states"], float(flow_tau(kwargs["timestep"][0]))
        if self._none is not None and tau == self._last:
            none, self._none = self._none, None
            return (none,)
        own = self.guidance.prompts.to(x.device, x.dtype)
        given = {name: own[[row]].repeat(len(x)) for row, name in enumerate(("none", "concept"))}

        def predict(*names: Prediction) -> tuple[torch.Tensor, ...]:
            same = {key: kwargs[key] for key in ("hidden_states", "timestep", "guidance") if kwargs[key] is not None}
            batch = {key: torch.cat([value] * len(names)) for key, value in same.items()}
            for key, attribute in self.reads.items():
                batch[key] = torch.cat([kwargs[key] if n == "wanted" else getattr(given[n], attribute) for n in names])
            return tuple(self.fn_ref.original_forward(**kwargs | batch)[0].chunk(len(names)))

        if self._embedded:
            none, conditional = self.steer(tau, predict)
            guided = none + self.guidance.scale * (conditional - none)
            return (guided if self.strength == 1 else torch.lerp(predict("wanted")[0], guided, self.strength),)
        none, conditional = self.pair(tau, predict)
        self._none = none
        return (conditional,)
