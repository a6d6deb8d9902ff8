"""CLIP by open_clip: unit vectors of images and of texts, with the preprocessing that the weights were trained on."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from erasekit.backbones.held import find_device
from erasekit.evaluation.evaluators import EvaluatorConfig
from erasekit.evaluation.natural.needs import as_arrays, had, package
from erasekit.quiet import quiet

ROWS = 64  # texts or images at once


class ClipConfig(EvaluatorConfig):
    """Settings of everything that looks through a CLIP."""

    model: str = Field(
        "ViT-B-32", description="a model of open_clip; hf-hub:OWNER/NAME or local-dir:FOLDER bring their own weights"
    )
    pretrained: str = Field("openai", description="open_clip's name of the weights, or a file of them")
    device: str = Field("auto", description="where it computes")


class OpenClip:
    """A CLIP of open_clip.

    Attributes:
        name: of the model and its weights, as metrics name them: `ViT-B-32/openai`.
        sha256: over all its tensors.
    """

    def __init__(self, config: ClipConfig, *, extra: str) -> None:
        """Load the weights, from open_clip's cache, the hub or a folder.

        Raises:
            EnvironmentProblem: open_clip or the weights are missing.
        """
        clip = package("open_clip", extra=extra)
        local = ":" in config.model
        own = Path(config.pretrained)
        tag = clip.get_pretrained_cfg(config.model.replace("/", "-"), config.pretrained) if not local else {}
        remedy = "Go online once, or give the evaluator model='local-dir:FOLDER' with open_clip's config and weights."
        with had(f"CLIP '{config.model}' ({config.pretrained})" if not local else f"CLIP '{config.model}'", remedy), quiet():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # OpenAI's weights were trained with another activation than open_clip's models have: without it they are wrong.
                activation = {"force_quick_gelu": bool(tag.get("quick_gelu"))}
                weights = None if local else config.pretrained
                net, self._prepare = clip.create_model_from_pretrained(config.model, weights, **activation)
            self._tokenize = clip.get_tokenizer(config.model)
        self._net: Any = net.requires_grad_(False).eval()
        self._place = config.device
        short = Path(config.model.partition(":")[2]).name if local else config.model
        self.name = short if local else f"{short}/{own.stem if own.is_file() else config.pretrained}"
        self.sha256 = _digest(self._net)

    def describe(self, version: str) -> dict[str, Any]:
        """The model, as an evaluator describes itself."""
        return {"model": f"CLIP {self.name}", "version": version, "sha256": self.sha256}

    @cached_property
    def _device(self) -> torch.device:
        device = find_device(self._place)
        self._net.to(device)
        return device

    @torch.no_grad()
    def images(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) uint8 -> (n, width), on the CPU."""
        inputs = torch.stack([self._prepare(Image.fromarray(array)) for array in as_arrays(images)])
        parts = [self._net.encode_image(part.to(self._device)) for part in inputs.split(ROWS)]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """N texts -> (n, width), on the CPU."""
        device = self._device
        parts = [self._net.encode_text(part.to(device)) for part in self._tokenize(list(texts)).split(ROWS)]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


def open_clip(config: ClipConfig, *, extra: str = "clip") -> OpenClip:
    """The CLIP of some settings, loaded once for all evaluators that ask for the same one.

    Raises:
        EnvironmentProblem: open_clip or the weights are missing.
    """
    return _loaded(ClipConfig(**config.model_dump(include=set(ClipConfig.model_fields))), extra)


@lru_cache(maxsize=2)
def _loaded(config: ClipConfig, extra: str) -> OpenClip:
    return OpenClip(config, extra=extra)


def _digest(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
