"""How far each image moved from the unedited model's of the same prompt and seed, as the eye sees it: LPIPS."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

from erasekit.backbones.held import find_device
from erasekit.evaluation.evaluators import Batch, Evaluator, EvaluatorConfig, Scores
from erasekit.evaluation.intervals import bootstrap
from erasekit.evaluation.natural.needs import downloaded, had, package, sha256
from erasekit.evaluation.results import Metric
from erasekit.evaluation.tasks import Prompt

WEIGHTS = {"alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights", "vgg": "VGG16_Weights"}
SETS = {"clean": "", "preserve": "/preserve"}  # what has to stay; in the metric's name


class LpipsConfig(EvaluatorConfig):
    """Settings of LPIPS."""

    net: Literal["alex", "squeeze", "vgg"] = Field("alex", description="the network; papers compare by alex")
    size: int = Field(256, ge=64, description="the side that images are resized to first")
    device: str = Field("auto", description="where it computes")


class Lpips(Evaluator):
    """LPIPS (Zhang et al. 2018) of each clean and each preserved image to the unedited model's, by torchmetrics."""

    name = "lpips"
    packages: ClassVar[Mapping[str, str]] = {"torchvision": "erasekit[lpips]"}
    Config = LpipsConfig
    meanings: ClassVar[Mapping[str, str]] = {
        "lpips": "perceptual distance of clean or preserved images to the unedited model's of the same prompts and seeds"
    }

    def __init__(self, **settings: Any) -> None:
        """Load the network.

        Raises:
            EnvironmentProblem: torchvision or the weights are missing.
        """
        super().__init__(**settings)
        weights = getattr(package("torchvision.models", extra="lpips"), WEIGHTS[self.config.net]).DEFAULT
        path, remedy = downloaded(weights.url)
        with had(f"LPIPS's {self.config.net}", remedy):
            metric = package("torchmetrics.image.lpip", extra="lpips").LearnedPerceptualImagePatchSimilarity(self.config.net)
        self._net: Any = metric.net
        self._sha256 = sha256(path)
        self._base: dict[tuple[str, str, int], int] = {}  # where an image of the unedited model lies in the file below
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._rows: list[dict[str, Any]] = []
        self._scores: dict[str, list[float]] = {which: [] for which in SETS}

    def describe(self) -> dict[str, Any]:
        """The network; its weights are torchvision's, its heads torchmetrics'."""
        settings = {"net": self.config.net, "size": self.config.size}
        return {"model": f"LPIPS {self.config.net}", "version": self.version, "sha256": self._sha256} | settings

    @cached_property
    def _device(self) -> torch.device:
        device = find_device(self.config.device)
        self._net.to(device)
        return device

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Keep the unedited model's images on disk, and compare those of the erased one with them."""
        images = self._resized(batch.images)
        rows: list[dict[str, Any]] = []
        for prompt, image in zip(batch.prompts, images, strict=True):
            place = self._base.get(_key(prompt)) if prompt.set in SETS else None
            if batch.side == "base" or place is None:  # the other one was not drawn or not readable
                rows.append({})
            else:
                pair = (t[None].to(self._device).float().div(127.5).sub(1) for t in (image, self._kept(place)))
                rows.append({"lpips": float(self._net(*pair))})
        for prompt, image, row in zip(batch.prompts, images, rows, strict=True):
            if batch.side == "base" and prompt.set in SETS:
                self._base[_key(prompt)] = self._file.seek(0, 2)
                self._file.write(image.contiguous().numpy().tobytes())
            if "lpips" in row:
                self._scores[prompt.set].append(row["lpips"])
        self._rows += rows

    def _resized(self, images: torch.Tensor) -> torch.Tensor:
        side = (self.config.size, self.config.size)
        smooth = F.interpolate(images.float(), side, mode="bicubic", antialias=True, align_corners=False)
        return smooth.round().clamp(0, 255).byte()

    def _kept(self, place: int) -> torch.Tensor:
        side = self.config.size
        self._file.seek(place)
        return torch.frombuffer(bytearray(self._file.read(3 * side * side)), dtype=torch.uint8).reshape(3, side, side)

    def compute(self) -> Scores:
        """A distance per image of the erased side, and their means."""
        metrics = {}
        for which, suffix in SETS.items():
            scores = np.array(self._scores[which])
            if which == "clean" or len(scores):
                interval = bootstrap([scores], lambda groups: float(groups[0].mean())) if len(scores) else None
                named: dict[str, Any] = {"higher_is_better": False, "evaluator": self.name}
                value = float(scores.mean()) if len(scores) else None
                metrics[f"lpips[{self.config.net}{suffix}]"] = Metric(value=value, ci95=interval, n=len(scores), **named)
        return Scores(self._rows, metrics)


def _key(prompt: Prompt) -> tuple[str, str, int]:
    return prompt.set, prompt.text, prompt.seed
