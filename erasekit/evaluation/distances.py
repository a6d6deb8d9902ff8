"""Distances between two sets of images, by features: Frechet and maximum mean discrepancy, of the clean images of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from erasekit.evaluation.evaluators import Batch, Evaluator, Scores, Side
from erasekit.evaluation.results import Metric

Summary = tuple[torch.Tensor, ...]  # all that a distance needs of a set of features


class SetDistance(Evaluator):
    """A distance of the clean images to two others: the unedited model's, and a reference. Subclasses give the features.

    `metric[F]` is the distance to the unedited model's images of the same prompts and seeds: 0 if nothing changed.
    `metric[F/reference]` is the distance to `reference()`, with the unedited model's own distance beside it. Neither has a
    sound bootstrap interval, and both are comparable at equal n only.

    Attributes:
        metric: the metric's name before the bracket.
        parts: names of the tensors of a summary, in files of references.
        features_name: the F of the metric's name.
        reference_name: what `reference()` is made of, in the metric's name.
        unedited_name: what the name of the distance to the unedited model says of it; "" where the bare name is understood so.
    """

    metric: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    features_name: str
    reference_name: str = "reference"
    unedited_name: ClassVar[str] = ""

    def __init__(self, **settings: Any) -> None:
        """Start with no images."""
        super().__init__(**settings)
        self._features: dict[Side, list[torch.Tensor]] = {"base": [], "erased": []}
        self._seen = 0

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) uint8 -> (n, d)."""
        raise NotImplementedError

    def summary(self, features: torch.Tensor) -> Summary:
        """What the distance needs of features (n, d), n of them at least 2."""
        raise NotImplementedError

    def distance(self, one: Summary, other: Summary) -> float:
        """The distance of two sets."""
        raise NotImplementedError

    def reference(self) -> Summary | None:
        """The summary of a set of reference images, if there is one."""
        return None

    def update(self, batch: Batch) -> None:
        """Keep the features of the clean images."""
        clean = [i for i, p in enumerate(batch.prompts) if p.set == "clean"]
        if clean:
            self._features[batch.side].append(self.features(batch.images[clean]).float().cpu())
        self._seen += len(batch.prompts)

    def compute(self) -> Scores:
        """Both distances; None where a side has fewer than two images."""
        sets: dict[Side, Summary | None] = {side: self._summary(side) for side in ("base", "erased")}
        unedited = self.features_name + (f"/{self.unedited_name}" if self.unedited_name else "")
        metrics = {f"{self.metric}[{unedited}]": self._metric(self._distance(sets["erased"], sets["base"]), None)}
        if reference := self.reference():
            values = [self._distance(sets[side], reference) for side in ("erased", "base")]
            metrics[f"{self.metric}[{self.features_name}/{self.reference_name}]"] = self._metric(values[0], values[1])
        return Scores([{} for _ in range(self._seen)], metrics)

    def _metric(self, value: float | None, base: float | None) -> Metric:
        n = sum(map(len, self._features["erased"]))
        return Metric(value=value, base=base, n=n, higher_is_better=False, evaluator=self.name)

    def _summary(self, side: Side) -> Summary | None:
        features = self._features[side]
        return self.summary(torch.cat(features)) if sum(map(len, features)) > 1 else None

    def _distance(self, one: Summary | None, other: Summary | None) -> float | None:
        return None if one is None or other is None else self.distance(one, other)


class FrechetEvaluator(SetDistance):
    """Frechet distance between Gaussians fitted to features (Heusel et al. 2017, Eq. 6). Of few images it is biased upwards."""

    metric = "frechet"
    parts = ("mean", "covariance")
    meanings: ClassVar[Mapping[str, str]] = {
        "frechet": "distance of the statistics of clean images to the unedited model's, or to the named reference's"
    }

    def summary(self, features: torch.Tensor) -> Summary:
        """Mean (d,) and covariance (d, d)."""
        return statistics(features)

    def distance(self, one: Summary, other: Summary) -> float:
        """See `frechet`."""
        return frechet(*one, *other)


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


Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (n, d), (m, d) -> (n, m)


def cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The kernel of KID, (x y / d + 1)^3 (Binkowski et al. 2018, Eq. 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The kernel of CMMD, exp(-|x - y|^2 / (2 10^2)) (Jayasumana et al. 2024, section 4)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-squares / (2 * 10.0**2))


def mmd(x: torch.Tensor, y: torch.Tensor, kernel: Kernel, *, unbiased: bool, rows: int = 1024) -> float:
    """The squared maximum mean discrepancy of features (n, d) and (m, d), in float64 (Gretton et al. 2012, Eqs. 3 and 5).

    Args:
        x: one set.
        y: the other.
        kernel: of pairs of features.
        unbiased: leave out each image's likeness to itself.
        rows: how many rows of the kernel's matrix are held at once.
    """
    x, y = x.double(), y.double()

    def mean(a: torch.Tensor, b: torch.Tensor, *, but_itself: bool = False) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(a), rows):
            likeness = kernel(a[start : start + rows], b)
            total += likeness.sum() - (likeness[:, start:].diagonal().sum() if but_itself else 0)
        return total / (len(a) * (len(b) - but_itself))

    return float(mean(x, x, but_itself=unbiased) + mean(y, y, but_itself=unbiased) - 2 * mean(x, y))
