"""The Frechet distance on EfficientNet-lite0's features: where FID's Inception cannot be downloaded, and never called FID."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from erasekit.backbones.held import find_device
from erasekit.evaluation.distances import FrechetEvaluator
from erasekit.evaluation.natural.imagenet import LITE0_PACKAGES, lite0
from erasekit.evaluation.natural.references import Referenced


class FrechetLite(Referenced, FrechetEvaluator):
    """`frechet[efficientnet-lite0]`: on the 1,280 features before the classes."""

    name = "frechet-lite"
    packages: ClassVar[Mapping[str, str]] = dict.fromkeys(LITE0_PACKAGES, "erasekit[offline]")
    features_name = "efficientnet-lite0"

    def __init__(self, **settings: Any) -> None:
        """Load the network.

        Raises:
            EnvironmentProblem: its package or weights are missing.
            UsageError: the reference is not there.
        """
        super().__init__(**settings)
        self._network = lite0()

    def weights(self) -> str:
        """The sha256 of its weights."""
        return self._network.sha256

    @cached_property
    def _device(self) -> torch.device:
        device = find_device(self.config.device)
        self._network.net.to(device)
        return device

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1280)."""
        net: Any = self._network.net
        maps = net.extract_features(self._network.prepare(images.to(self._device)))
        return F.adaptive_avg_pool2d(maps, 1).flatten(1)
