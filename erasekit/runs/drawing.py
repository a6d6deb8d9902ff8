"""The images of a run, of both sides: drawn once for all runs that want them, each process its share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasekit.atomic import linked
from erasekit.backbones.protocol import Backbone
from erasekit.erasures.loading import load_into, unload
from erasekit.evaluation.sampling import model_key, sample, write_index
from erasekit.events import Sampled
from erasekit.processes import here
from erasekit.runs.current import Run


def base_images(this: Run, backbone: Backbone, *, cache: Path, alone: bool = False) -> list[Path]:
    """Images of the unedited model. Every run is compared with the same ones: kept in `cache`, linked into the run.

    Args:
        this: the run.
        backbone: the model.
        cache: where images are kept for other runs.
        alone: no other process of this run draws a share of them.
    """
    pipe = backbone.pipeline(encoders=False, shared=True)
    return _sampled(this, backbone, pipe, cache / "base" / model_key(backbone), which="base", alone=alone)


def erased_images(this: Run, backbone: Backbone, sha256: str, *, cache: Path, alone: bool = False) -> list[Path]:
    """The same prompts and seeds, drawn by a fresh pipeline that has loaded the files of the erasure.

    Its denoiser is the backbone's, every bit of it as it was loaded. The images are kept like the unedited model's, so that one
    who measures the erasure in another way draws only what is missing.
    """
    if not backbone.unchanged():  # a method left something on it
        backbone.release("denoiser")
    pipe = backbone.pipeline(encoders=False, shared=True)
    load_into(pipe, this.directory.path / "erasure", base=backbone, component=this.registries.components.get)
    try:
        return _sampled(this, backbone, pipe, cache / "erased" / model_key(backbone, sha256), which="erased", alone=alone)
    finally:
        unload(pipe)


def _sampled(this: Run, backbone: Backbone, pipe: Any, folder: Path, *, which: str, alone: bool) -> list[Path]:
    """The evaluation prompts, drawn by a pipeline into the folder of all its images, and linked into the run.

    An image does not depend on those that are drawn beside it, so processes can share the prompts as they like.
    """

    def draw(rows: Sequence[int]) -> list[Path]:
        prompts = [this.prompts[i] for i in rows]
        encoded, empty = backbone.encode([p.text for p in prompts]), backbone.encode([""])

        def drawn(done: int, total: int) -> None:
            this.emit(Sampled(which, done, total))

        return sample(backbone, pipe, prompts, encoded, empty, this.plan.protocol, folder, on_batch=drawn)

    every = range(len(this.prompts))
    if here().count > 1 and not alone:
        draw(here().share(every))
        here().wait()
    paths = draw(every)
    if not here().first:
        return paths
    own = this.directory.path / "images" / which
    write_index(own, this.prompts, [path.name for path in paths])
    return [linked(path, own / path.name) for path in paths]
