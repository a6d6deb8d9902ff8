"""Shows a run on stderr: a live line for each stage and one for all on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from erasekit.backbones.memory import peak_memory_mb
from erasekit.events import Event, Noted, Progressed, RunFailed, RunFinished, RunStarted, Sampled, StageStarted, StepEnd
from erasekit.runs.forecast import Forecast
from erasekit.texts import shown

SECONDS_BETWEEN_LINES = 60.0


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
        """The time left and the rate, "" while nothing is known."""
        seconds = (time.monotonic() - self._since) / max(1, done - self._first)
        if done == self._first or not seconds:
            return ""
        rate = f"{seconds:.1f} s each" if seconds >= 1 else f"{1 / seconds:.1f}/s"
        return f"{duration(seconds * (total - done))} left, {rate}, "


class Bars:
    """Listens to a run and draws a line for each stage, with what it is at, rate, time left and memory, and one for all.

    Attributes:
        started: whether a run began; one that was finished before does not.
    """

    def __init__(self, forecast: Forecast | None = None, console: Console | None = None) -> None:
        """Draw on stderr; without a forecast, no line says when all will be done."""
        console = console or Console(stderr=True)
        whole = Column(no_wrap=True)  # in a narrow terminal the note is cut, and nothing else
        name = TextColumn("{task.description:11}", table_column=whole)
        note = TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1), markup=False)
        bar = BarColumn(min(40, max(8, console.width - 76)), table_column=whole)
        elapsed = TimeElapsedColumn(table_column=whole)
        self.started = False
        self._forecast = forecast
        self._progress = Progress(name, bar, MofNCompleteColumn(table_column=whole), elapsed, note, expand=True)
        self._whole = Progress(name, elapsed, note, expand=True)
        self._live = Live(Group(self._progress, self._whole), console=console, refresh_per_second=4)
        self._pace = Pace()
        self._task: TaskID | None = None
        self._all: TaskID | None = None

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._finish()
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if isinstance(event, RunStarted):
            self.started = True
            self._clear()
            self._live.console.print(_title(event), highlight=False, markup=False)
        elif isinstance(event, StageStarted):
            self._finish()
            self._pace, self._task = Pace(), self._progress.add_task(event.stage, total=None, note="")
        elif isinstance(event, Noted):
            self._live.console.print(event.line, highlight=False, markup=False)
        elif isinstance(event, RunFinished):
            self._finish()
        elif counted := _count(event):
            self._draw(*counted)
        self._tell(event)

    def _draw(self, part: str, done: int, total: int, note: str) -> None:
        """Show how far a part of the stage is, in the stage's own line."""
        if self._task is None:
            self._task = self._progress.add_task(part, total=total, note="")
        self._pace.begins(part, done)
        told = f"{part}: {self._pace.told(done, total)}{memory()}{_comma(note)}"
        self._progress.update(self._task, completed=done, total=total, note=told)

    def _tell(self, event: Event) -> None:
        """Say in the last line when all will be done."""
        if self._forecast is None:
            return
        self._forecast(event)
        if self._all is None:
            self._all = self._whole.add_task("whole run", note="")
        self._whole.update(self._all, note=ahead(self._forecast))

    def _finish(self) -> None:
        """Fill the line of the stage that ends; one that counted nothing gets a single step."""
        if self._task is not None:
            task = next(t for t in self._progress.tasks if t.id == self._task)
            self._progress.update(self._task, completed=task.total or 1, total=task.total or 1, note=memory())
            self._progress.stop_task(self._task)

    def _clear(self) -> None:
        """Take the lines of an earlier concept's run away."""
        self._task = None
        for task in self._progress.task_ids:
            self._progress.remove_task(task)


class Lines:
    """Listens to a run and writes a line for each stage that ends, and one a minute within a long one.

    Attributes:
        started: whether a run began; one that was finished before does not.
    """

    def __init__(self, forecast: Forecast | None = None) -> None:
        """Write to stderr."""
        self.started = False
        self._forecast = forecast
        self._stage, self._pace, self._began, self._last = "", Pace(), 0.0, 0.0
        self._done, self._main = "", False  # what the stage has done: steps or images, if it counts any

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._end()

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if self._forecast is not None:
            self._forecast(event)
        now = time.monotonic()
        if isinstance(event, RunStarted):
            self.started = True
            _write(f"{_title(event)}{_comma(ahead(self._forecast))}")
        elif isinstance(event, StageStarted):
            self._end()
            self._stage, self._pace, self._began, self._last = event.stage, Pace(), now, now
            self._done, self._main = "", False
        elif isinstance(event, Noted):
            _write(event.line)
        elif isinstance(event, RunFinished):
            self._end()
        elif isinstance(event, RunFailed):
            self._stage = ""
        elif counted := _count(event):
            part, done, total, note = counted
            self._pace.begins(part, done)
            at = f"{part} {done}/{total}, "
            main = not isinstance(event, Progressed)
            if main or not self._main:
                self._done, self._main = at, main
            if now - self._last > SECONDS_BETWEEN_LINES:
                self._last = now
                told = f"{self._pace.told(done, total)}{memory()}{_comma(note)}"
                _write(f"{self._stage}: {at}{told}{_comma(ahead(self._forecast))}")

    def _end(self) -> None:
        """Write what the stage that ends did."""
        if self._stage:
            took = f"{duration(time.monotonic() - self._began)}, {memory()}"
            _write(f"{self._stage}: {self._done}{took}{_comma(ahead(self._forecast))}")
        self._stage = ""


def listener(forecast: Forecast | None = None) -> Bars | Lines:
    """What fits stderr: live lines on a terminal where somebody may look, few ones in a file, a pipe, or in CI."""
    live = sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
    return Bars(forecast) if live else Lines(forecast)


def ahead(forecast: Forecast | None) -> str:
    """When all will be done, "" where nobody knows."""
    left = forecast.left() if forecast is not None else None
    if left is None or left < 1:
        return ""
    return f"all in about {duration(left)}, at {datetime.now() + timedelta(seconds=left):%H:%M}"


def memory() -> str:
    """The most memory that was in use."""
    used = peak_memory_mb()
    return f"{used:.0f} MB" if used < 1000 else f"{used / 1000:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _comma(text: str) -> str:
    return f"; {text}" if text else ""


def _write(line: str) -> None:
    with suppress(OSError):  # nobody may be listening any more, which must not cost a run
        sys.stderr.write(f"{shown(line)}\n")
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
        return "steps", event.step, event.total, ", ".join(f"{k} {v:.2g}" for k, v in event.values.items())
    return None
