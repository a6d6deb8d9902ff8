"""The base of what says of each image whether it shows what it was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from erasekit.evaluation.evaluators import Batch, Evaluator, Rows, Scores, Side
from erasekit.evaluation.intervals import bootstrap
from erasekit.evaluation.results import Metric

NOT_OF_THE_PROTOCOL = {"device", "gallery", "paintings", "reference", "weights", "model", "pretrained"}  # said by content


class PerImage(Evaluator):
    """A row per image, from nothing but the image, its prompt and the settings. Subclasses implement `look`.

    Attributes:
        labels: the labels that it can find in an image.
    """

    per_image: ClassVar[bool] = True
    labels: tuple[str, ...] = ()

    def __init__(self, **settings: Any) -> None:
        """Start with no images."""
        super().__init__(**settings)
        self._rows: list[dict[str, Any]] = []

    def look(self, batch: Batch) -> list[dict[str, Any]]:
        """A row per image (see `judgement`)."""
        raise NotImplementedError

    def update(self, batch: Batch) -> None:
        """Look at a batch."""
        self._rows += self.look(batch)

    def compute(self) -> Scores:
        """A row per image."""
        return Scores(self._rows)

    def settings(self) -> dict[str, Any]:
        """The settings that its scores depend on, as `describe` states them: not where files lie, nor the device."""
        return {k: v for k, v in self.config.model_dump(mode="json").items() if k not in NOT_OF_THE_PROTOCOL}


def judgement(label: str, seen: Sequence[str], scores: Mapping[str, float | None]) -> dict[str, Any]:
    """What a judge says of one image.

    Args:
        label: what the image was asked for.
        seen: the labels that are found in it.
        scores: of all labels that the judge knows.
    """
    shown = label in seen if label in scores else None
    return {"seen": list(seen), "shown": shown, "score": scores.get(label)}


def column(rows: Rows, key: str, which: str) -> dict[Side, np.ndarray]:
    """The numbers in a column of a prompt set, of either side; images without one are left out."""
    return {side: np.array([r[key] for r in of if r["set"] == which and r.get(key) is not None]) for side, of in rows.items()}


def own_scores(rows: Rows, judge: str, which: str) -> dict[Side, np.ndarray]:
    """A judge's scores of the labels that the images of a prompt set were asked for, of either side.

    Where several judges look at an image, each one's stands in a column of its own name.
    """

    def own(row: Mapping[str, Any]) -> Any:
        plain = row.get("score") if row.get("judge", judge) == judge else None
        return row.get(f"{judge}.score", plain)

    return column({side: [{"set": r["set"], "own": own(r)} for r in of] for side, of in rows.items()}, "own", which)


def mean_metric(scores: Mapping[Side, np.ndarray], evaluator: str, *, higher_is_better: bool) -> Metric:
    """The mean of scores per image, with a bootstrap interval."""
    mean: dict[Side, float | None] = {side: float(of.mean()) if len(of) else None for side, of in scores.items()}
    erased = scores["erased"]
    interval = bootstrap([erased], lambda groups: float(groups[0].mean())) if len(erased) else None
    named: dict[str, Any] = {"higher_is_better": higher_is_better, "evaluator": evaluator}
    return Metric(value=mean["erased"], base=mean["base"], ci95=interval, n=len(erased), **named)
