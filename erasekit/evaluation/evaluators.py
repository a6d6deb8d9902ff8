"""What looks at images: evaluators, their scores, and the Frechet distance of sets of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from erasekit.evaluation.results import Metric
from erasekit.evaluation.tasks import Prompt

Side = Literal["base", "erased"]


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


class EvaluatorConfig(BaseModel):
    """Base of every evaluator's settings: frozen, and unknown keys are errors. They are part of the protocol."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Evaluator:
    """Looks at images of both sides. Subclasses set `name` and implement `describe`, `update` and `compute`.

    An `update` either takes the whole batch or raises and takes nothing. What it raises for a single image counts as a
    failure on that image, never as "concept absent".

    Attributes:
        name: the registered name.
        version: rises when any of its scores could change.
        Config: the settings, which the constructor takes by keyword; field descriptions are the documentation.
        meanings: {metric of its own, as it is called before a bracket: what it means, in a few words}.
    """

    name: ClassVar[str]
    version: str = "1"
    meanings: ClassVar[Mapping[str, str]] = {}
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


class FrechetEvaluator(Evaluator):
    """Frechet distance between features of the clean images (Heusel et al. 2017, Eq. 6). Subclasses give the features.

    `frechet[F]` is the distance to the unedited model's images of the same prompts and seeds: 0 if nothing changed.
    `frechet[F/reference]` is the distance to `reference()`, with the unedited model's own distance beside it. Distances of
    few images are biased upwards, so both are comparable at equal n only, and neither has a sound bootstrap interval.

    Attributes:
        features_name: the F of the metric's name.
        reference_name: what `reference()` is made of, in the metric's name.
    """

    meanings: ClassVar[Mapping[str, str]] = {
        "frechet": "distance of the statistics of clean images to the unedited model's, or to the named reference's"
    }
    features_name: ClassVar[str]
    reference_name: ClassVar[str] = "reference"

    def __init__(self, **settings: Any) -> None:
        """Start with no images."""
        super().__init__(**settings)
        self._features: dict[Side, list[torch.Tensor]] = {"base": [], "erased": []}
        self._seen = 0

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) uint8 -> (n, d)."""
        raise NotImplementedError

    def reference(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean (d,) and covariance (d, d) of a set of reference images, if there is one."""
        return None

    def update(self, batch: Batch) -> None:
        """Keep the features of the clean images."""
        clean = [i for i, p in enumerate(batch.prompts) if p.set == "clean"]
        if clean:
            self._features[batch.side].append(self.features(batch.images[clean]).double().cpu())
        self._seen += len(batch.prompts)

    def compute(self) -> Scores:
        """Both distances; None where a side has fewer than two images."""
        stats: dict[Side, tuple[torch.Tensor, torch.Tensor] | None] = {s: self._statistics(s) for s in ("base", "erased")}
        n = sum(len(f) for f in self._features["erased"])
        metrics = {f"frechet[{self.features_name}]": self._metric(_distance(stats["erased"], stats["base"]), None, n)}
        if reference := self.reference():
            values = [_distance(stats[side], reference) for side in ("erased", "base")]
            metrics[f"frechet[{self.features_name}/{self.reference_name}]"] = self._metric(values[0], values[1], n)
        return Scores([{} for _ in range(self._seen)], metrics)

    def _metric(self, value: float | None, base: float | None, n: int) -> Metric:
        return Metric(value=value, base=base, n=n, higher_is_better=False, evaluator=self.name)

    def _statistics(self, side: Side) -> tuple[torch.Tensor, torch.Tensor] | None:
        parts = self._features[side]
        return statistics(torch.cat(parts)) if sum(map(len, parts)) > 1 else None


def _distance(one: tuple[torch.Tensor, torch.Tensor] | None, other: tuple[torch.Tensor, torch.Tensor] | None) -> float | None:
    return None if one is None or other is None else frechet(*one, *other)


def statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet(mean_1: torch.Tensor, cov_1: torch.Tensor, mean_2: torch.Tensor, cov_2: torch.Tensor) -> float:
    """Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau 1982), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: it stays
    real for covariances that are singular, as those of few images are.
    """
    mean_1, cov_1, mean_2, cov_2 = (t.double() for t in (mean_1, cov_1, mean_2, cov_2))
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = root @ cov_2 @ root
    trace = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=0).sqrt().sum()
    distance: torch.Tensor = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace
    return max(0.0, float(distance))
