"""Shows a run on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from erasekit.backbones.memory import peak_memory_mb
from erasekit.events import Event, Noted, Progressed, RunFinished, RunStarted, Sampled, StageStarted, StepEnd

SECONDS_BETWEEN_LINES = 10.0


class Pace:
    """Times one part of a stage at a time, so that what is left is told from the part's own beginning."""

    def __init__(self) -> None:
        """Nothing is timed yet."""
        self.part, self._since, self._first, self._last = "", 0.0, 0, 0

    def begins(self, part: str, done: int) -> bool:
        """Whether these are the first words about a part; from here on it is timed."""
        new = part != self.part or done < self._last
        if new:
            self.part, self._since, self._first = part, time.monotonic(), done
        self._last = done
        return new

    def told(self, done: int, total: int) -> str:
        """The rate and the time left, "" while nothing is known."""
        seconds = (time.monotonic() - self._since) / max(1, done - self._first)
        if done == self._first or not seconds:
            return ""
        rate = f"{seconds:.1f} s each" if seconds >= 1 else f"{1 / seconds:.1f} a second"
        return f"{rate}, {seconds * (total - done):.0f} s left  "


class Bars:
    """Listens to a run and draws a bar per stage and per part of it, with rate, time left and memory.

    Attributes:
        started: whether a run began; one that was finished before does not.
    """

    def __init__(self) -> None:
        """Draw on stderr."""
        columns = (
            TextColumn("{task.description:22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.started = False
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._stage, self._pace = "", Pace()
        self._parts: dict[str, TaskID] = {}  # of the stage; work that comes again has its bar again
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
            self._stage, self._pace, self._parts = event.stage, Pace(), {}
            self._task = self._progress.add_task(event.stage, total=None, note="")
        elif isinstance(event, Noted):
            self._progress.console.print(event.line, highlight=False, markup=False)
        elif isinstance(event, RunFinished):
            self._finish()
        elif counted := _count(event):
            self._draw(*counted)

    def _draw(self, part: str, done: int, total: int, note: str) -> None:
        """Move the bar of a part: the stage's first part has the bar of the stage, each other one a bar of its own."""
        if self._pace.begins(part, done):
            if part in self._parts:
                self._task = self._parts[part]
                self._progress.reset(self._task)
            elif self._parts or self._task is None:
                self._finish()
                self._task = self._progress.add_task(part, total=total, note="")
            self._parts[part] = self._task
        told = f"{note}{self._pace.told(done, total)}{peak_memory_mb():.0f} MB"
        self._progress.update(self._parts[part], description=f"{self._stage}: {part}", completed=done, total=total, note=told)

    def _finish(self) -> None:
        """Fill the bar of the stage that ends; one that counted nothing gets a single step."""
        if self._task is not None:
            task = next(t for t in self._progress.tasks if t.id == self._task)
            self._progress.update(self._task, completed=task.total or 1, total=task.total or 1)

    def _clear(self) -> None:
        """Take the bars of an earlier concept's run away."""
        self._task, self._parts = None, {}
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
        self._stage, self._pace, self._last = "", Pace(), 0.0

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
            self._stage, self._pace, self._last = event.stage, Pace(), now
            _write(event.stage)
        elif isinstance(event, Noted):
            _write(event.line)
        elif counted := _count(event):
            part, done, total, note = counted
            self._pace.begins(part, done)
            ends = done == total and not isinstance(event, Progressed)
            if now - self._last > SECONDS_BETWEEN_LINES or ends:
                self._last = now
                told = self._pace.told(done, total)
                _write(f"{self._stage}: {part} {done}/{total}  {note}{told}{peak_memory_mb():.0f} MB")


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


def _count(event: Event) -> tuple[str, int, int, str] | None:
    """(part, done, total, note) of an event that counts something."""
    if isinstance(event, Progressed):
        return event.what, event.done, event.total, ""
    if isinstance(event, Sampled):
        return "images", event.done, event.total, ""
    if isinstance(event, StepEnd):
        return "steps", event.step, event.total, " ".join(f"{k} {v:.3g}" for k, v in event.values.items()) + "  "
    return None
