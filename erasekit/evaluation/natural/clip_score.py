"""How well images fit their prompts: the CLIP score, with the model that it is by in its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from erasekit.evaluation.evaluators import Batch, Rows
from erasekit.evaluation.natural.clip import ClipConfig, open_clip
from erasekit.evaluation.natural.per_image import PerImage, column, mean_metric
from erasekit.evaluation.results import Metric


class ClipScore(PerImage):
    """100 x the cosine of an image and its prompt, not below 0 (Hessel et al. 2021 times 40); the mean over clean prompts."""

    name = "clip-score"
    packages: ClassVar[Mapping[str, str]] = {"open_clip": "erasekit[clip]"}
    Config = ClipConfig
    meanings: ClassVar[Mapping[str, str]] = {"clip_score": "how well the images of clean prompts fit their prompts"}

    def __init__(self, **settings: Any) -> None:
        """Load CLIP.

        Raises:
            EnvironmentProblem: open_clip or the weights are missing.
        """
        super().__init__(**settings)
        self._clip = open_clip(self.config)

    def describe(self) -> dict[str, Any]:
        """CLIP."""
        return self._clip.describe(self.version)

    def look(self, batch: Batch) -> list[dict[str, Any]]:
        """The score of each image."""
        texts = self._clip.texts([p.text for p in batch.prompts])
        scores = (100 * (self._clip.images(batch.images) * texts).sum(1)).clamp(min=0)
        return [{"clip_score": float(score)} for score in scores]

    def metrics_of(self, rows: Rows) -> dict[str, Metric]:
        """The mean over clean images."""
        scores = column(rows, "clip_score", "clean")
        return {f"clip_score[{self._clip.name}]": mean_metric(scores, self.name, higher_is_better=True)}
