"""Erasures that act while an image is drawn: no weight changes, and whoever leaves them out has the base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from erasekit.backbones.protocol import Backbone, Conditioning
from erasekit.concepts import Concept
from erasekit.documents import Damaged, read_document
from erasekit.erasures.manifest import ADVICE, PROMPTS, SETTINGS, Name
from erasekit.safety import reject_unsafe
from erasekit.texts import Lines


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
        prompts: dict[str, Any] = {"pooled": None, **tensors}
        return cls(record.scheme, record.settings, record.texts, Conditioning(**prompts), record.scale)


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
    sides = {"tokens": 3, "pooled": 2, "ids": 2, "lengths": 1, "before": 2}
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
