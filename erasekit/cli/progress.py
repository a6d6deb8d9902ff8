"""Shows a run on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from erasekit.events import Event, RunFinished, RunStarted, Sampled, StageStarted, StepEnd
from erasekit.memory import peak_memory_mb

SECONDS_BETWEEN_LINES = 10.0


class Bars:
    """Listens to a run and draws a bar per stage, with step, time left and memory.

    Attributes:
        started: whether a run began; one that was finished before does not.
    """

    def __init__(self) -> None:
        """Draw on stderr."""
        columns = (
            TextColumn("{task.description:12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.started = False
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if isinstance(event, RunStarted):
            self.started = True
            self._clear()
            self._progress.console.print(_title(event), highlight=False, markup=False)
        elif isinstance(event, StageStarted):
            self._finish()
            self._task = self._progress.add_task(event.stage, total=None, note="")
        elif isinstance(event, RunFinished):
            self._finish()
        elif self._task is not None and (counted := _count(event)):
            done, total, note = counted
            self._progress.update(self._task, completed=done, total=total, note=f"{note}{peak_memory_mb():.0f} MB")

    def _finish(self) -> None:
        """Fill the bar of the stage that ends; one that counted nothing gets a single step."""
        if self._task is not None:
            task = next(t for t in self._progress.tasks if t.id == self._task)
            self._progress.update(self._task, completed=task.total or 1, total=task.total or 1)

    def _clear(self) -> None:
        """Take the bars of an earlier concept's run away."""
        self._task = None
        for task in self._progress.task_ids:
            self._progress.remove_task(task)


class Lines:
    """Listens to a run and writes a line per stage, and one every ten seconds within it.

    Attributes:
        started: whether a run began; one that was finished before does not.
    """

    def __init__(self) -> None:
        """Write to stderr."""
        self.started = False
        self._stage, self._since, self._last = "", 0.0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def __call__(self, event: Event) -> None:
        """Write one event."""
        now = time.monotonic()
        if isinstance(event, RunStarted):
            self.started = True
            _write(_title(event))
        elif isinstance(event, StageStarted):
            self._stage, self._since, self._last = event.stage, now, now
            _write(event.stage)
        elif (counted := _count(event)) and (now - self._last > SECONDS_BETWEEN_LINES or counted[0] == counted[1]):
            done, total, note = counted
            left = (now - self._since) / max(done, 1) * (total - done)
            self._last = now
            _write(f"{self._stage} {done}/{total}  {note}{left:.0f} s left  {peak_memory_mb():.0f} MB")


def listener() -> Bars | Lines:
    """What fits stderr."""
    return Bars() if sys.stderr.isatty() else Lines()


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _title(event: RunStarted) -> str:
    verb = "Going on with" if event.resumed else "Starting"
    what = ", ".join(event.concepts)
    return f"{verb} {event.config_hash}: {event.method} erases {what} from {event.backbone}, measured on {event.task}"


def _count(event: Event) -> tuple[int, int, str] | None:
    if isinstance(event, Sampled):
        return event.done, event.total, ""
    if isinstance(event, StepEnd):
        return event.step, event.total, " ".join(f"{k} {v:.3g}" for k, v in event.values.items()) + "  "
    return None
