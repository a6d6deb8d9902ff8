"""From the events of a run to a tracker of accelerate's: losses, images while training, and the numbers at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from erasekit.events import Evaluated, Event, RunFailed, RunFinished, RunStarted, StepEnd, Watched

PROJECT = "erasekit"
SIDES = (("erased", "value"), ("base", "base"))  # of a metric, as trackers are told
FOLDER = "tracker"  # in the run directory, for those that write files

_open: dict[Path, Tracked] = {}  # by run directory


def hear(event: Event, path: Path) -> None:
    """Tell the tracker of the run in `path`, if it asked for one."""
    if isinstance(event, RunStarted) and event.tracker:
        _open[path] = Tracked(event, path)
    elif path in _open:
        _open[path].tell(event, path)
        if isinstance(event, RunFinished | RunFailed):
            _open.pop(path).tracker.finish()


class Tracked:
    """A run and its tracker."""

    def __init__(self, event: RunStarted, path: Path) -> None:
        """Start the tracker, and tell it what is done."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's trackers write to its log, which asks for it
        kind = LOGGER_TYPE_TO_CLASS[event.tracker]
        concepts = ", ".join(event.concepts)
        given: dict[str, Any] = {}
        if kind.requires_logging_directory:
            given["logging_dir"] = path / FOLDER
        if event.tracker == "wandb":
            name = f"{event.method}: {concepts} from {event.backbone}"
            given |= {"name": name, "id": event.config_hash, "resume": "allow", "dir": os.fspath(path)}
        self.tracker: Any = kind(PROJECT, **given)
        self.tracker.start()
        what = {"method": event.method, "backbone": event.backbone, "task": event.task, "concepts": concepts}
        self.tracker.store_init_configuration({**what, "config_hash": event.config_hash, **_plain(event.settings)})
        self.step = self._before = self._last = 0

    def tell(self, event: Event, path: Path) -> None:
        """Hand on what a tracker is for."""
        if isinstance(event, StepEnd):
            if event.step <= self._last:  # another training of the same run
                self._before += self._last
            self._last = event.step
            self.step = self._before + event.step
            self.tracker.log({f"train/{name}": float(value) for name, value in event.values.items()}, step=self.step)
        elif isinstance(event, Watched) and not event.blurred:
            self._show(path / "samples" / event.file, event.step)
        elif isinstance(event, Evaluated):
            numbers = {
                f"{side}/{name}": m[key] for name, m in event.metrics.items() for side, key in SIDES if m[key] is not None
            }
            self.tracker.log(numbers, step=self.step)

    def _show(self, file: Path, step: int) -> None:
        """Send an image, to a tracker that takes any."""
        import numpy as np
        from PIL import Image

        if not hasattr(self.tracker, "log_images"):
            return
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))[None]
        how = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
        self.tracker.log_images({"samples": pixels}, step=max(step, self.step), **how)


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as trackers take them: numbers and texts."""
    return {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in settings.items()}
