"""Distances to a set of real images that the user names: what they need of it is computed once, kept, and shared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from erasekit.atomic import replacing
from erasekit.errors import UsageError
from erasekit.evaluation.distances import SetDistance, Summary
from erasekit.evaluation.evaluators import EvaluatorConfig
from erasekit.evaluation.natural.needs import image_files, read, sha256
from erasekit.events import note, progress

AT_ONCE = 16  # images of one size


class ReferenceConfig(EvaluatorConfig):
    """Settings of a distance to reference images."""

    reference: str = Field(
        "", description="a folder of images (COCO's val2014, say), or the .safetensors file that was made of one; empty: none"
    )
    device: str = Field("auto", description="where it computes")


class Referenced(SetDistance):
    """A distance whose reference is a folder of the user's, or a file of what a distance needs of one.

    Of a folder, that is computed once and kept in `ERASEKIT_CACHE`, under a key over the features and over the names, sizes and
    times of the images: further runs read it, and the file may be handed on in place of the images.
    """

    Config = ReferenceConfig

    def __init__(self, **settings: Any) -> None:
        """See that the reference is there.

        Raises:
            UsageError: it is not, or it is of other features.
        """
        super().__init__(**settings)
        self._path = Path(self.config.reference).expanduser() if self.config.reference else None
        if self._path:
            self.reference_name = self._path.stem
            if not self._path.is_file() and not (self._path.is_dir() and image_files(self._path)):
                raise UsageError(f"There is no image in '{self._path}'. Give evaluators.{self.name}.reference=FOLDER.")

    def weights(self) -> str:
        """The sha256 of what computes the features."""
        raise NotImplementedError

    def reference(self) -> Summary | None:
        """What the distance needs of the reference."""
        return self._reference[0] if self._reference else None

    @cached_property
    def _reference(self) -> tuple[Summary, dict[str, str]] | None:
        """The summary of the reference, and what its file says of itself."""
        if self._path is None:
            return None
        return self._read(self._path if self._path.is_file() else self._kept(self._path))

    def _kept(self, folder: Path) -> Path:
        """The file of a folder's summary, made now if there is none."""
        files = image_files(folder)
        named = [(str(p.relative_to(folder)), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
        key = hashlib.sha256(json.dumps([self._identity(), named]).encode()).hexdigest()[:16]
        path = cache() / "reference" / f"{folder.name}-{self.metric}-{key}.safetensors"
        if not path.is_file():
            summary = self.summary(torch.cat([self.features(images).float().cpu() for images in _batches(files)]))
            said = {**self._identity(), "name": folder.name, "images": str(len(files))}
            with replacing(path) as temporary:
                parts = {name: t.contiguous() for name, t in zip(self.parts, summary, strict=True)}
                save_file(parts, temporary, metadata=said)
            note(f"Reference statistics of {len(files)} images are kept in '{path}'.")
        return path

    def _read(self, path: Path) -> tuple[Summary, dict[str, str]]:
        try:
            with safe_open(path, framework="pt") as file:
                said = dict(file.metadata() or {})
                summary = tuple(file.get_tensor(name) for name in self.parts)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"'{path.name}' is no file of reference statistics for '{self.name}': {error}.") from error
        if wrong := {k: v for k, v in self._identity().items() if said.get(k) != v}:
            name, want = next(iter(wrong.items()))
            raise UsageError(
                f"'{path.name}' is of {name} {said.get(name)}; '{self.name}' has {want}. Make it of the images again."
            )
        return summary, said | {"sha256": sha256(path)}

    def _identity(self) -> dict[str, str]:
        """What has to agree for a summary to be of use."""
        return {"features": self.features_name, "weights": self.weights()}

    def describe(self) -> dict[str, Any]:
        """The features, and the reference by the sha256 of what was computed of it."""
        said: dict[str, Any] = {"model": self.features_name, "version": self.version, "sha256": self.weights()}
        if self._reference:
            found = self._reference[1]
            said["reference"] = {k: found.get(k, "") for k in ("name", "images", "sha256")}
        return said


def cache() -> Path:
    """Where what is computed once is kept: `ERASEKIT_CACHE`, or a folder in the user's own cache."""
    return Path(os.environ.get("ERASEKIT_CACHE") or Path.home() / ".cache" / "erasekit")


def _batches(files: Sequence[Path]) -> Iterator[torch.Tensor]:
    """The images of files as (n, 3, h, w) uint8, neighbours of one size together."""
    waiting: list[torch.Tensor] = []
    for done, path in enumerate(files):
        progress("reference images", done, len(files))
        image = torch.from_numpy(read(path)).permute(2, 0, 1)
        if waiting and (waiting[0].shape != image.shape or len(waiting) == AT_ONCE):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    progress("reference images", len(files), len(files))
    yield torch.stack(waiting)
