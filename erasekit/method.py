"""The base of every erasure method, and what a method is handed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict

from erasekit.memory import LORA_GB, Footprint

if TYPE_CHECKING:
    from erasekit.backbone import Backbone, Conditioning
    from erasekit.concepts import Concept
    from erasekit.config import Plan
    from erasekit.erasure import Erasure
    from erasekit.tasks import Prompt, Protocol, Split, Task


# A setting that takes one name or several.
OneOrSeveral = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
# Of a setting that may be left open: TOML has no word for it, so that `-s method.KEY=none` arrives as text.
OrNone = BeforeValidator(lambda value: None if value == "none" else value)


class MethodConfig(BaseModel):
    """Base of every method's settings: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _registered(slot: str, name: str) -> Any:
    from erasekit.plugins import default

    return default().components.get(slot, name)


@dataclass
class RunContext:
    """All that a method may touch.

    Attributes:
        backbone: the loaded model; its adapters belong to the method while it runs.
        concepts: what to erase.
        task: where prompts for training and validation come from.
        seed: the run's seed; use `generator(name)`.
        directory: the run directory, None outside of a run; checkpoints go to `directory / "checkpoints"`.
        log: called with (step, total, {name: value}) once per training step.
        component: looks up what is registered for a slot, e.g. component("refine", "whitened").
        protocol: how pictures will be drawn, so that a method can train on what sampling meets; the task's, if left out.
        shared: what is drawn once in a run and used by several of its parts.
        warnings: what the erasure has to tell its users, one line each; see `warn`.
    """

    backbone: Backbone
    concepts: tuple[Concept, ...]
    task: Task
    seed: int = 0
    directory: Path | None = None
    log: Callable[[int, int, Mapping[str, float]], None] = field(default=lambda step, total, values: None)
    component: Callable[[str, str], Any] = field(default=_registered)
    protocol: Protocol = None  # type: ignore[assignment]  # the task's, see below
    shared: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take the task's protocol if none is given."""
        if self.protocol is None and self.task is not None:
            self.protocol = self.task.protocol

    def predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The backbone's prediction at the guidance scale that sampling will use, where the model is told one."""
        return self.backbone.predict(x, tau, cond, guidance=self.protocol.guidance)

    def warn(self, line: str) -> None:
        """Tell the user of the erasure something: it is printed, and stands in erasure.json, results, report and card."""
        self.warnings.append(line)

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator of its own for each named use: adding a use never shifts another one's numbers."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def prompts(self, which: str, split: Split = "train") -> list[Prompt]:
        """Prompts of the task for training or choosing settings; never those that numbers are measured on.

        Raises:
            ValueError: the evaluation split was asked for.
        """
        if split == "evaluation":
            raise ValueError("Evaluation prompts are for measuring only; use 'train' or 'validation'.")
        return self.task.prompts(which, self.concepts, split)


class Method:
    """An erasure method. Subclasses set the class attributes and implement `erase`.

    Attributes:
        name: the registered name.
        version: rises when equal settings give another erasure, so that a finished run of before is not taken for it.
        Config: the settings; field descriptions are the documentation.
        defaults: settings that differ per backbone name or family, e.g. {"flux": {...}}.
        presets: named sets of settings.
        ablations: {row of a table: settings that differ from the default}.
        requires: capabilities a backbone must have (see `Capabilities.names`), e.g. {"velocity"}.
        slots: settings that name a registered component (or several) of the slot with the setting's name.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    requires: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        """Keep the validated settings, an instance of `Config`."""
        self.config = config

    def footprint(self, plan: Plan) -> Footprint:
        """What a training step holds at once, from which its memory is predicted.

        By default one row for each of the settings' `batch` and a LoRA for each concept, if the settings train at all.
        """
        config = self.config
        rows = getattr(config, "batch", 1) if getattr(config, "steps", 0) else 0
        return Footprint(rows=rows, trained_gb=LORA_GB * len(plan.concepts))

    def texts(self, ctx: RunContext) -> list[str]:
        """All prompts that `erase` may encode once the denoiser is loaded: on most GPUs the text encoders are gone by then.

        Those that the concepts and the task give for training and for choosing settings, with their neutral forms. A
        method that makes prompts of its own adds them.
        """
        from erasekit.prompts import training_texts

        return training_texts(ctx)

    def erase(self, ctx: RunContext) -> Erasure:
        """Compute the erasure of `ctx.concepts` from `ctx.backbone`; leaves the backbone's own weights untouched."""
        raise NotImplementedError
