"""How long a run will still take: from earlier runs of its kind in the same folder, and from its own pace."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from erasekit.errors import ErasekitError
from erasekit.events import Event, Progressed, RunFailed, RunFinished, RunStarted, Sampled, StageStarted, StepEnd
from erasekit.runs.offers import offered
from erasekit.runs.plan import Plan
from erasekit.runs.preflight import erase_rows, image_rows
from erasekit.runs.records import read_log
from erasekit.runs.rundir import path_of, read_status

STAGES = ("load", "encode", "base_images", "erase", "certify", "sample", "evaluate", "attack", "report")
DRAWING = {"base_images": "base", "sample": "erased"}  # stages that draw images, and which
FEW = 4  # images, of which fewer say little of how long one takes


class Earlier(NamedTuple):
    """Seconds that finished runs took, a list for each: by image that they drew themselves, to erase, and by stage."""

    image: list[float]
    erase: list[float]
    stages: dict[str, list[float]]


def earlier(out: Path, plan: Plan) -> Earlier:
    """Seconds that finished runs under `out` took on the plan's backbone: for an image, and to erase by its method.

    Images count where they have the plan's size and steps, erasures where they were made with the plan's settings.
    """
    from erasekit.evaluation.results import read_result

    together = 1 if plan.separate else len(plan.concepts)
    found = Earlier([], [], {})
    for path in sorted((out / plan.config.backbone).glob("*/*/*/results.json")):
        with suppress(ErasekitError):  # of another version, or cut
            result = read_result(path)
            log = list(read_log(path.parent / "log.jsonl", only=("RunStarted", "StageStarted", "Sampled")))
            if all(result.protocol.get(key) == getattr(plan.protocol, key) for key in ("steps", "size")):
                found.image.extend(_each_image(log))
            if (result.method, len(result.concepts)) == (plan.config.method, together) and result.timings_s["erase"]:
                if _method_of(plan.settings()) == _method_of(next((e.get("settings", {}) for e in log), {})):
                    found.erase.append(result.timings_s["erase"])
                for stage, seconds in read_status(path.parent).get("timings_s", {}).items():
                    found.stages.setdefault(stage, []).append(seconds)
    return found


def _method_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.startswith("method.")}


def _each_image(log: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds for an image that a run drew, of both sides together; none if it found nearly all of them drawn already."""
    drawn, seconds, before = 0, 0.0, None
    for event in log:
        here = None
        if event["event"] == "Sampled":
            here = (event["done"], datetime.fromisoformat(event["time"]))
            if before is not None and here[0] > before[0]:
                drawn, seconds = drawn + here[0] - before[0], seconds + (here[1] - before[1]).total_seconds()
        before = here  # another stage, or another attempt, begins anew
    return [seconds / drawn] if drawn >= FEW else []


@dataclass
class Forecast:
    """Hears a run, or several one after the other, and says how long they will still take.

    Attributes:
        images: that a run draws of each side.
        erase_rows: about how many rows of the denoiser the method predicts.
        image_rows: how many drawing an image takes.
        runs: how many runs there are, with the one at work.
        image_s: seconds for an image, where they are known.
        stage_s: seconds of stages, where they are known.
    """

    images: int = 0
    erase_rows: float = 0.0
    image_rows: float = 1.0
    runs: int = 1
    image_s: float | None = None
    stage_s: dict[str, float] = field(default_factory=dict)
    _stage: str = ""
    _stage_began: float = 0.0
    _run_began: float | None = None
    _part: tuple[str, int, int] = ("", 0, 0)  # of the stage: its name, done, total
    _first: tuple[int, float] = (0, 0.0)  # of the part: what was done when, at its beginning
    _took: list[float] = field(default_factory=list)  # seconds of the runs that have ended
    _image_now: float | None = None  # seconds for an image, as the first ones go

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        now = time.monotonic()
        if isinstance(event, RunStarted):
            self._run_began, self._stage = now, ""
        elif isinstance(event, StageStarted):
            self._end_stage(now)
            self._stage, self._stage_began, self._part = event.stage, now, ("", 0, 0)
        elif isinstance(event, RunFinished | RunFailed):
            self._end_stage(now)
            self.runs, self._stage = self.runs - 1, ""
            self._took.append(self._gone())
            self._run_began = None
        elif isinstance(event, Sampled):
            self._counted("images", event.done, event.total, first=(event.done, now))
        elif isinstance(event, StepEnd):
            self._counted("steps", event.step, event.total, first=(event.step, now))
        elif isinstance(event, Progressed):
            self._counted(event.what, event.done, event.total, first=(event.done, now))
        if self.image_s is None and self._stage in DRAWING:
            self._image_now = self._pace(now)

    def left(self) -> float | None:
        """Seconds until all runs are done; None while nothing is known of what takes longest."""
        if self.runs < 1:
            return 0.0
        here = self._this_run()
        if here is None:
            return None
        whole = median(self._took) if self._took else here + self._gone()
        return here + whole * max(0, self.runs - 1)

    def _gone(self) -> float:
        """Seconds since the run at work began."""
        return 0.0 if self._run_began is None else time.monotonic() - self._run_began

    def _this_run(self) -> float | None:
        coming = STAGES[STAGES.index(self._stage) + 1 :] if self._stage in STAGES else STAGES
        expected = {stage: self._expected(stage) for stage in coming}
        if any(expected.get(stage, 0.0) is None for stage in ("base_images", "erase", "sample")):
            return None
        now = self._of_stage()
        return None if now is None else now + sum(seconds or 0.0 for seconds in expected.values())

    def _expected(self, stage: str) -> float | None:
        """Seconds of a stage that has not begun; None where nothing is known."""
        image_s = self._image_now if self.image_s is None else self.image_s
        if stage in DRAWING and image_s is not None:
            return image_s * self.images
        if stage in self.stage_s:
            return self.stage_s[stage]
        if stage == "erase" and image_s is not None:
            return image_s / self.image_rows * self.erase_rows
        return None

    def _pace(self, now: float) -> float | None:
        """Seconds for each piece of the part at work; None before the first is done."""
        done = self._part[1] - self._first[0]
        return (now - self._first[1]) / done if done > 0 else None

    def _of_stage(self) -> float | None:
        """Seconds until the stage at work is done."""
        if not self._stage:
            return 0.0
        part, done, total = self._part
        now = time.monotonic()
        pace = self._pace(now)
        if self._stage in DRAWING:
            each = pace if pace is not None else self.image_s
            return None if each is None else each * ((total or self.images) - done)
        if part == "steps" and pace is not None:
            return pace * (total - done)
        expected = self._expected(self._stage)
        if expected is None:
            return None if self._stage == "erase" else 0.0
        return max(expected - (now - self._stage_began), pace * (total - done) if pace is not None else 0.0)

    def _counted(self, part: str, done: int, total: int, *, first: tuple[int, float]) -> None:
        if part != self._part[0] or done < self._part[1]:
            self._first = first
        self._part = part, done, total

    def _end_stage(self, now: float) -> None:
        """Learn from the stage that ends, for the stages and the runs that come."""
        if not self._stage:
            return
        drawn = self._part[1] - self._first[0] if self._part[0] == "images" else 0
        if self._stage in DRAWING and drawn:  # images that were there already say nothing
            self.image_s = (now - self._first[1]) / drawn
        elif self._stage not in DRAWING and (self._stage != "erase" or self._part[0]):  # one that was taken counted nothing
            self.stage_s[self._stage] = now - self._stage_began


def forecast(plan: Plan, out: Path, images: int, *, anew: bool = False) -> Forecast:
    """What is known before a plan begins.

    Args:
        plan: what is done, perhaps a run for each concept.
        out: where earlier runs are looked for.
        images: that a run draws of each side.
        anew: no erasure is taken from an earlier run.
    """
    known = earlier(out, plan)
    singles = plan.singles() if plan.separate else [plan]
    waiting = [p for p in singles if not finished(path_of(out, p))]
    erase = _median("erase", known.erase)
    if waiting and not anew and all(offered(out, p) for p in waiting):
        erase = {"erase": 0.0}
    stages: Mapping[str, list[float]] = {k: v for k, v in known.stages.items() if k not in DRAWING}
    return Forecast(
        images=images,
        erase_rows=erase_rows(singles[0]),
        image_rows=image_rows(plan),
        runs=max(1, len(waiting)),
        image_s=median(known.image) if known.image else None,
        stage_s={stage: median(seconds) for stage, seconds in stages.items()} | erase,
    )


def _median(stage: str, seconds: list[float]) -> dict[str, float]:
    return {stage: median(seconds)} if seconds else {}


def finished(path: Path) -> bool:
    """Whether the run in a directory has come to its end."""
    with suppress(ErasekitError):
        return bool(read_status(path).get("state") == "finished")
    return False
