"""Which of a few names an image shows, by CLIP without training: MACE's measure on the ten classes of CIFAR-10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from erasekit.evaluation.evaluators import Batch, Rows
from erasekit.evaluation.natural.clip import ClipConfig, open_clip
from erasekit.evaluation.natural.per_image import PerImage, judgement, mean_metric, own_scores
from erasekit.evaluation.results import Metric

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SETS = {"p_e": "erase", "p_g": "synonyms", "p_s": "preserve"}


class Clip10Config(ClipConfig):
    """Settings of the zero-shot classifier."""

    labels: tuple[str, ...] = Field((), description="the names; without any, the ten classes of CIFAR-10")
    template: str = Field("a photo of the {}", description="what the text of a name is")


class Clip10(PerImage):
    """The likeliest of a few names: softmax over 100 x the cosine of image and "a photo of the NAME", MACE's evaluation.

    One of the names is always seen: an image that shows nothing of them is judged all the same. MACE reports the mean
    probability of the class that was asked for, here `p_e` (in its tables Acc_e), `p_s` and `p_g`; `acc_e` by this judge is the
    share of images whose likeliest name it is.
    """

    name = "clip10"
    packages: ClassVar[Mapping[str, str]] = {"open_clip": "erasekit[clip]"}
    Config = Clip10Config
    meanings: ClassVar[Mapping[str, str]] = {
        "p_e": "mean probability of the erased name on its prompts, what MACE prints as Acc_e",
        "p_g": "the same for synonyms, plurals and other wordings",
        "p_s": "mean probability of what was asked for on prompts of everything else",
    }

    def __init__(self, **settings: Any) -> None:
        """Load CLIP and encode the names.

        Raises:
            EnvironmentProblem: open_clip or the weights are missing.
        """
        super().__init__(**settings)
        self.labels = self.config.labels or CIFAR10
        self._clip = open_clip(self.config)
        self._texts = self._clip.texts([self.config.template.format(name) for name in self.labels])

    def describe(self) -> dict[str, Any]:
        """CLIP and the names."""
        return self._clip.describe(self.version) | self.settings() | {"labels": list(self.labels)}

    def look(self, batch: Batch) -> list[dict[str, Any]]:
        """The likeliest name of each image."""
        logits = 100 * self._clip.images(batch.images) @ self._texts.T
        rows = []
        for prompt, probability in zip(batch.prompts, logits.double().softmax(1), strict=True):
            scores = dict(zip(self.labels, probability.tolist(), strict=True))
            rows.append(judgement(prompt.label, [self.labels[int(probability.argmax())]], scores))
        return rows

    def metrics_of(self, rows: Rows) -> dict[str, Metric]:
        """The mean probabilities."""
        found = {}
        for metric, which in SETS.items():
            scores = own_scores(rows, self.name, which)
            if len(scores["erased"]):
                found[f"{metric}[{self.name}]"] = mean_metric(scores, self.name, higher_is_better=metric == "p_s")
        return found
