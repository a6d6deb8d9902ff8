"""What looks at images: evaluators and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from erasekit.evaluation.results import Metric
from erasekit.evaluation.tasks import Prompt
from erasekit.settings import Settings

Side = Literal["base", "erased"]
Rows = Mapping[Side, Sequence[Mapping[str, Any]]]  # the scored images of both sides


@dataclass(frozen=True)
class Batch:
    """Images of one side.

    Attributes:
        images: (n, 3, h, w) uint8.
        prompts: what each was drawn from.
        side: drawn by the unedited model (`base`) or by the erased one.
    """

    images: torch.Tensor
    prompts: Sequence[Prompt]
    side: Side


@dataclass(frozen=True)
class Scores:
    """What an evaluator saw.

    Attributes:
        rows: scores per image, in the order of the updates; {} where it has nothing to say about a single image. A judge's rows
            have the fields of a `judgement.Judgement`: metrics such as `acc_e` are made from them.
        metrics: numbers of whole sets.
    """

    rows: list[dict[str, Any]]
    metrics: dict[str, Metric] = field(default_factory=dict)


class EvaluatorConfig(Settings):
    """Base of every evaluator's settings: frozen, and unknown keys are errors. They are part of the protocol."""


class Evaluator:
    """Looks at images of both sides. Subclasses set `name` and implement `describe`, `update` and `compute`.

    An `update` either takes the whole batch or raises and takes nothing. What it raises for a single image counts as a
    failure on that image, never as "concept absent".

    Attributes:
        name: the registered name.
        version: rises when any of its scores could change.
        per_image: its row of an image depends on nothing but the image, its prompt and `describe()`, so that it is kept and not
            computed again. Its numbers come from `metrics_of`.
        Config: the settings, which the constructor takes by keyword; field descriptions are the documentation.
        packages: {module that it imports: what pip installs for it} of packages that erasekit itself does not need; those that
            are missing are named before anything is loaded.
        meanings: {metric of its own, as it is called before a bracket: what it means, in a few words}.
    """

    name: ClassVar[str]
    version: str = "1"
    packages: ClassVar[Mapping[str, str]] = {}
    meanings: ClassVar[Mapping[str, str]] = {}
    per_image: ClassVar[bool] = False
    Config: ClassVar[type[EvaluatorConfig]] = EvaluatorConfig

    def __init__(self, **settings: Any) -> None:
        """Take the settings, checked against `Config`."""
        self.config: Any = self.Config(**settings)

    @property
    def tag(self) -> str:
        """`name@version`, as results name it."""
        return f"{self.name}@{self.version}"

    def describe(self) -> dict[str, Any]:
        """`model`, `version`, `sha256` of the weights, and the settings that its scores depend on: part of the protocol."""
        raise NotImplementedError

    def update(self, batch: Batch) -> None:
        """Look at a batch."""
        raise NotImplementedError

    def compute(self) -> Scores:
        """Scores of all images so far."""
        raise NotImplementedError

    def metrics_of(self, rows: Rows) -> dict[str, Metric]:
        """Its own numbers, where they come from the rows of the scored images alone: with their prompts and all scores."""
        return {}
