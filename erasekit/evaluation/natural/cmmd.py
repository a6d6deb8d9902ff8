"""CMMD: a distance of sets of images on CLIP's features that is sound for a few hundred images (Jayasumana et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.evaluation.distances import Summary, gaussian, mmd
from erasekit.evaluation.natural.clip import ClipConfig, open_clip
from erasekit.evaluation.natural.references import ReferenceConfig, Referenced


class CmmdConfig(ReferenceConfig, ClipConfig):
    """Settings of CMMD."""

    model: str = Field("ViT-L-14-336", description="a model of open_clip; the published numbers are of this one")


class Cmmd(Referenced):
    """1,000 x the squared maximum mean discrepancy of CLIP's unit vectors, with a Gaussian kernel of width 10, as published."""

    name = "cmmd"
    packages: ClassVar[Mapping[str, str]] = {"open_clip": "erasekit[clip]"}
    Config = CmmdConfig
    metric = "cmmd"
    parts = ("features",)
    unedited_name = "unedited"
    meanings: ClassVar[Mapping[str, str]] = {
        "cmmd": "discrepancy of CLIP's features of the clean images and of the named reference's, or of the unedited model's"
    }

    def __init__(self, **settings: Any) -> None:
        """Load CLIP.

        Raises:
            EnvironmentProblem: open_clip or the weights are missing.
            UsageError: the reference is not there.
        """
        super().__init__(**settings)
        self._clip = open_clip(self.config)
        self.features_name = self._clip.name

    def weights(self) -> str:
        """The sha256 of CLIP's tensors."""
        return self._clip.sha256

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, width): unit vectors."""
        return self._clip.images(images)

    def summary(self, features: torch.Tensor) -> Summary:
        """The features themselves."""
        return (features,)

    def distance(self, one: Summary, other: Summary) -> float:
        """See `distances.mmd`; each image's likeness to itself counts, as in the published code."""
        return 1000 * mmd(one[0], other[0], gaussian, unbiased=False)
