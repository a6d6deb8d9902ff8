"""What a method is handed: all that it may touch."""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from erasekit.backbones.protocol import Backbone, BackboneConfig, Conditioning, Predict
from erasekit.concepts import Concept
from erasekit.errors import UsageError
from erasekit.evaluation.tasks import Prompt, Protocol, Split, Task, asked


def _unregistered(slot: str, name: str) -> Any:
    raise UsageError(f"There is no '{name}' for '{slot}': this RunContext was given no `component` to look it up.")


class Planned(typing.Protocol):
    """What a method may know of a run before it begins."""

    @property
    def backbone(self) -> type[Backbone]:
        """The model's class."""

    @property
    def backbone_config(self) -> BackboneConfig:
        """The model's settings."""

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """What is to be erased."""

    @property
    def protocol(self) -> Protocol:
        """How images will be drawn."""


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
        watch: called with (name, step, total, predict) before the first step and after each step of a training that has a
            name: whoever wants to see what the student draws by then.
        component: looks up what is registered for a slot, e.g. component("refine", "whitened").
        protocol: how images will be drawn, so that a method can train on what sampling meets; the task's, if left out.
        shared: what is drawn once in a run and used by several of its parts.
        warnings: what the erasure has to tell its users, one line each; see `warn`.
    """

    backbone: Backbone
    concepts: tuple[Concept, ...]
    task: Task
    seed: int = 0
    directory: Path | None = None
    log: Callable[[int, int, Mapping[str, float]], None] = field(default=lambda step, total, values: None)
    watch: Callable[[str, int, int, Predict], None] = field(default=lambda name, step, total, predict: None)
    component: Callable[[str, str], Any] = field(default=_unregistered)
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
        return asked(self.task, which, self.concepts, split)
