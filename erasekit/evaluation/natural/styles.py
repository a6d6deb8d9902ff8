"""Whose style an image is in: by CLIP without training, or by a linear probe on paintings that the user gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

from erasekit.errors import UsageError
from erasekit.evaluation.evaluators import Batch, Rows
from erasekit.evaluation.natural.clip import ClipConfig, open_clip
from erasekit.evaluation.natural.needs import albums, digest_of, package, read
from erasekit.evaluation.natural.per_image import PerImage, column, judgement, mean_metric
from erasekit.evaluation.results import Metric

# MACE's five, which its prompts are made of.
TEMPLATES = (
    "Image in the style of {}",
    "Art inspired by {}",
    "Painting in the style of {}",
    "A reproduction of art by {}",
    "A famous artwork by {}",
)
NOBODY = "_"  # a folder of paintings whose name begins so is of no artist


class StylesConfig(ClipConfig):
    """Settings of the zero-shot judge of styles."""

    labels: tuple[str, ...] = Field((), description="the artists; without any, those of the task")
    templates: tuple[str, ...] = Field(TEMPLATES, min_length=1, description="what the texts of an artist are")
    others: tuple[str, ...] = Field(
        ("a photograph", "a painting", "a drawing"),
        description="texts of no artist: an image that fits one of them better shows none of the styles",
    )


class Styles(PerImage):
    """The artist whose texts an image fits best, by CLIP without training; nobody, if a text of no artist fits better.

    Also MACE's numbers: CLIP_e and CLIP_p, 100 x the cosine of image and prompt on the erased artists' prompts and on the
    preserved ones', and H_a, their difference.
    """

    name = "styles"
    packages: ClassVar[Mapping[str, str]] = {"open_clip": "erasekit[styles]"}
    Config = StylesConfig
    meanings: ClassVar[Mapping[str, str]] = {
        "clip_e": "100 x the cosine of image and prompt on the erased artists' prompts (MACE's CLIP_e)",
        "clip_p": "the same on the preserved artists' prompts (MACE's CLIP_p)",
        "h_a": "clip_p - clip_e, MACE's H_a: a difference, not a mean",
    }

    def __init__(self, **settings: Any) -> None:
        """Load CLIP and encode the artists.

        Raises:
            EnvironmentProblem: open_clip or the weights are missing.
            UsageError: no artist is named.
        """
        super().__init__(**settings)
        self.labels = self.config.labels
        if not self.labels:
            raise UsageError("'styles' has no artists to tell apart. Name them: evaluators.styles.labels=['NAME', ...].")
        self._clip = open_clip(self.config)
        means = [self._clip.texts([t.format(who) for t in self.config.templates]).mean(0) for who in self.labels]
        self._classes = torch.cat([F.normalize(torch.stack(means), dim=-1), self._clip.texts(self.config.others)])

    def describe(self) -> dict[str, Any]:
        """CLIP, the artists and their texts."""
        return self._clip.describe(self.version) | self.settings()

    def look(self, batch: Batch) -> list[dict[str, Any]]:
        """The artist of each image, and how well it fits its prompt."""
        images = self._clip.images(batch.images)
        fits = 100 * (images * self._clip.texts([p.text for p in batch.prompts])).sum(1)
        rows = []
        for i, probability in enumerate((100 * images @ self._classes.T).double().softmax(1)):
            scores = dict(zip(self.labels, probability.tolist(), strict=False))
            best = int(probability.argmax())
            seen = [self.labels[best]] if best < len(self.labels) else []
            rows.append(judgement(batch.prompts[i].label, seen, scores) | {"style_fit": float(fits[i])})
        return rows

    def metrics_of(self, rows: Rows) -> dict[str, Metric]:
        """`clip_e`, `clip_p`, and `h_a` where both are."""
        named = f"[{self._clip.name}]"
        erased, kept = (column(rows, "style_fit", which) for which in ("erase", "preserve"))
        e, p = (mean_metric(of, self.name, higher_is_better=of is kept) for of in (erased, kept))
        found = {f"clip_e{named}": e} if e.n else {}
        found |= {f"clip_p{named}": p} if p.n else {}
        if e.value is not None and p.value is not None:
            base = p.base - e.base if p.base is not None and e.base is not None else None
            found[f"h_a{named}"] = Metric(
                value=p.value - e.value, base=base, n=e.n + p.n, higher_is_better=True, evaluator=self.name
            )
        return found


class ProbeConfig(ClipConfig):
    """Settings of the linear probe."""

    paintings: str = Field("", description="folder of the user's: a folder of paintings for each artist (ARTIST/*.jpg)")
    labels: tuple[str, ...] = Field((), description="artists that must be among them; without any, those of the task")
    c: float = Field(0.316, gt=0, description="inverse strength of the regularisation, CLIP's choice")


class StylesProbe(PerImage):
    """The likeliest artist by logistic regression on CLIP's features of paintings of the user's (Radford et al. 2021, 3.2).

    A folder whose name begins with an underscore holds art of nobody in particular: an image that looks like it shows no style.
    """

    name = "styles-probe"
    packages: ClassVar[Mapping[str, str]] = {"open_clip": "erasekit[styles]", "sklearn": "erasekit[styles]"}
    Config = ProbeConfig

    def __init__(self, **settings: Any) -> None:
        """Load CLIP and fit the probe.

        Raises:
            EnvironmentProblem: open_clip, scikit-learn or the weights are missing.
            UsageError: there are no paintings, or of fewer than two names.
        """
        super().__init__(**settings)
        paintings = albums(self.config.paintings, setting="evaluators.styles-probe.paintings", holds="paintings")
        if missing := [who for who in self.config.labels if who not in paintings]:
            raise UsageError(
                f"There are no paintings of {', '.join(missing)} in '{self.config.paintings}'. Add a folder for each."
            )
        if len(paintings) < 2:
            raise UsageError(f"'{self.config.paintings}' has paintings of one name only. A probe tells two or more apart.")
        self.labels = tuple(who for who in paintings if not who.startswith(NOBODY))
        self._clip = open_clip(self.config, extra="styles")
        self._sha256 = digest_of([(who, path) for who, files in paintings.items() for path in files])
        self._fit(paintings)

    def _fit(self, paintings: Mapping[str, list[Path]]) -> None:
        linear, selection = (package(f"sklearn.{m}", extra="styles") for m in ("linear_model", "model_selection"))
        features = np.stack([self._features(path) for files in paintings.values() for path in files])
        names = [who for who, files in paintings.items() for _ in files]
        self._probe = linear.LogisticRegression(C=self.config.c, max_iter=1000)
        folds = min(5, *map(len, paintings.values()))
        share = selection.cross_val_score(self._probe, features, names, cv=folds).mean() if folds > 1 else None
        self._accuracy = (
            "not measured" if share is None else f"{share:.3f} of {len(names)} paintings, each left out of one of {folds} folds"
        )
        self._probe.fit(features, names)

    def _features(self, path: Path) -> np.ndarray:
        features: np.ndarray = self._clip.images(torch.from_numpy(read(path)).permute(2, 0, 1)[None]).numpy()[0]
        return features

    def describe(self) -> dict[str, Any]:
        """CLIP, the paintings, and how often the probe is right on paintings that it was not fitted to."""
        fitted = {"paintings": self._sha256, "accuracy": self._accuracy, "labels": list(self.labels)}
        return self._clip.describe(self.version) | self.settings() | fitted

    def look(self, batch: Batch) -> list[dict[str, Any]]:
        """The likeliest artist of each image."""
        rows = []
        for prompt, probability in zip(
            batch.prompts, self._probe.predict_proba(self._clip.images(batch.images).numpy()), strict=True
        ):
            scores = {str(who): float(p) for who, p in zip(self._probe.classes_, probability, strict=True)}
            best = max(scores, key=scores.__getitem__)
            known = {who: scores[who] for who in self.labels}
            rows.append(judgement(prompt.label, [best] if best in known else [], known))
        return rows
