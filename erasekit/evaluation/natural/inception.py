"""FID and KID: distances of the features of the Inception network that FID is defined with, as two libraries resize for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import nn

from erasekit.backbones.held import find_device
from erasekit.evaluation.distances import FrechetEvaluator, SetDistance, Summary, cubic, mmd
from erasekit.evaluation.evaluators import Scores
from erasekit.evaluation.natural.needs import downloaded, had, package, sha256
from erasekit.evaluation.natural.references import ReferenceConfig, Referenced
from erasekit.events import note

Library = Literal["torch-fidelity", "torchmetrics"]
MODULE = "torch_fidelity.feature_extractor_inceptionv3"
WIDTH = 2048


class InceptionConfig(ReferenceConfig):
    """Settings of FID and KID."""

    weights: str = Field("", description="a .safetensors file of torch-fidelity's Inception; empty: its own, downloaded once")


def inception(library: Library, weights: str) -> tuple[nn.Module, str]:
    """FID's Inception (the TensorFlow weights of 2015), and the sha256 of its weights.

    torch-fidelity resizes as TensorFlow 1 did, without antialiasing; torchmetrics resizes with it.

    Raises:
        EnvironmentProblem: the library or the weights are missing, damaged or of another network.
    """
    fidelity = package(MODULE, extra="fid")
    url = fidelity.URL_INCEPTION_V3
    path, remedy = (Path(weights).expanduser(), "") if weights else downloaded(url)
    with had("FID's Inception", f"{remedy} Give evaluators.NAME.weights a .safetensors file of it."):
        if weights:
            tensors = load_file(path)
        else:
            tensors = torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
        # Its constructor loads the weights itself, and would take any pickle for them. It is handed the tensors instead.
        with _handed(fidelity, tensors):
            if library == "torchmetrics":
                net = package("torchmetrics.image.fid", extra="fid").NoTrainInceptionV3("inception-v3-compat", [str(WIDTH)])
            else:
                net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", [str(WIDTH)])
    return net.requires_grad_(False).eval(), sha256(path)


@contextmanager
def _handed(module: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have a module that downloads weights take these."""
    download = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: tensors
    try:
        yield
    finally:
        module.load_state_dict_from_url = download


class _Inception(Referenced):
    """A distance on Inception's 2,048 features."""

    Config = InceptionConfig
    unedited_name = "unedited"
    packages: ClassVar[Mapping[str, str]] = {"torch_fidelity": "erasekit[fid]", "torchvision": "erasekit[fid]"}
    library: ClassVar[Library] = "torch-fidelity"

    def __init__(self, **settings: Any) -> None:
        """Load Inception.

        Raises:
            EnvironmentProblem: torch-fidelity or the weights are missing.
            UsageError: the reference is not there.
        """
        super().__init__(**settings)
        self.features_name = self.library
        self._net, self._sha256 = inception(self.library, self.config.weights)

    def weights(self) -> str:
        """The sha256 of Inception's weights."""
        return self._sha256

    @cached_property
    def _device(self) -> torch.device:
        device = find_device(self.config.device)
        self._net.to(device)
        return device

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 2048): what the pool before the classes holds."""
        found = self._net(images.to(self._device))
        features: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return features


class Fid(_Inception, FrechetEvaluator):
    """FID as torch-fidelity computes it. `fid[torch-fidelity/unedited]` is no FID of the literature: both sets are generated.

    With fewer images than features it is mostly bias; `kid` and `cmmd` are made for few.
    """

    name = "fid"
    metric = "fid"
    meanings: ClassVar[Mapping[str, str]] = {
        "fid": "Frechet Inception distance of the clean images to the named reference's, or to the unedited model's"
    }

    def compute(self) -> Scores:
        """FID; says so when there are too few images for it to mean much."""
        n = sum(map(len, self._features["erased"]))
        if 0 < n <= WIDTH:
            note(f"'{self.name}' of {n} images is mostly bias: it has {WIDTH} features. 'kid' and 'cmmd' are made for few.")
        return super().compute()


class FidTorchmetrics(Fid):
    """FID as torchmetrics computes it: images are resized with antialiasing, so that its numbers are not torch-fidelity's."""

    name = "fid-torchmetrics"
    library = "torchmetrics"


class Kid(_Inception, SetDistance):
    """KID: the unbiased squared discrepancy with a cubic kernel (Binkowski et al. 2018), of all images at once."""

    name = "kid"
    metric = "kid"
    parts = ("features",)
    meanings: ClassVar[Mapping[str, str]] = {
        "kid": "kernel Inception distance of the clean images to the named reference's, or to the unedited model's"
    }

    def summary(self, features: torch.Tensor) -> Summary:
        """The features themselves."""
        return (features,)

    def distance(self, one: Summary, other: Summary) -> float:
        """See `distances.mmd`."""
        return mmd(one[0], other[0], cubic, unbiased=True)
