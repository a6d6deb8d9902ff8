"""What happens in a run, told to the log, to the command line and to every plugin with an `on_event` hook."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import pluggy


class Run(Protocol):
    """What events know of the run that they happen in."""

    @property
    def path(self) -> Path:
        """Its directory."""

    def log(self, event: Event) -> None:
        """Write an event to its log."""


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    def record(self) -> dict[str, Any]:
        """The event as a line of `log.jsonl`."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class RunStarted(Event):
    """A run begins, or goes on where it was stopped; `settings` are the method's and the protocol's, `method.KEY`."""

    method: str
    backbone: str
    task: str
    concepts: tuple[str, ...]
    config_hash: str
    resumed: bool
    tracker: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage of the run begins."""

    stage: str


@dataclass(frozen=True)
class Progressed(Event):
    """Of a part of a stage's work, `what` (`encoding`, `trajectories`, ...), `done` of `total` is done; see `progress`."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Noted(Event):
    """A method has something to say in one line, e.g. which other words it erases; see `note`."""

    line: str


@dataclass(frozen=True)
class StepEnd(Event):
    """One training step is done."""

    step: int
    total: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Watched(Event):
    """A training method's images after a step, the base's above them, lie in `samples/` as `file`.

    `blurred` says that they are not to be seen, nor sent anywhere.
    """

    step: int
    file: str
    prompts: tuple[str, ...]
    blurred: bool


@dataclass(frozen=True)
class Sampled(Event):
    """Of the images of a side, `which` (`base` or `erased`), `done` of `total` are there; first those that were before."""

    which: str
    done: int
    total: int


@dataclass(frozen=True)
class Saved(Event):
    """The erasure is on disk."""

    path: Path
    sha256: str

    def record(self) -> dict[str, Any]:
        """The line of the log, without the absolute path."""
        return {"event": "Saved", "path": self.path.name, "sha256": self.sha256}


@dataclass(frozen=True)
class Evaluated(Event):
    """The images are scored: {metric: {"value": ..., ...}}."""

    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class RunFinished(Event):
    """The run is complete; its results are in `results.json` in the directory."""

    directory: Path

    def record(self) -> dict[str, Any]:
        """The line of the log, without the path."""
        return {"event": "RunFinished"}


@dataclass(frozen=True)
class RunFailed(Event):
    """The run ended with an error; what was finished is kept."""

    error: str


Listener = Callable[[Event], None]

SECONDS_BETWEEN = 1.0  # of two events about the same work
_heard: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("erasekit_progress", default=None)

_listener: ContextVar[Callable[[Event], None] | None] = ContextVar("erasekit_listener", default=None)


def progress(what: str, done: int, total: int) -> None:
    """Say how far some work is that may take long: heard by the run that it is done for, by nobody outside of one.

    Args:
        what: names the work in a word or two, e.g. `encoding`.
        done: how many pieces of it are done; 0 before the first, so that the first can be timed.
        total: how many there are.
    """
    tell = _heard.get()
    if tell is not None:
        tell(what, done, total)


def note(line: str) -> None:
    """Say something that a user should see while the work goes on, in one line: heard as `progress` is."""
    listener = _listener.get()
    if listener is not None:
        listener(Noted(line))


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Hand what `progress` is told in this block to `listener`: begin and end of any work, and between them one a second."""
    last = 0.0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done in (0, total) or now - last >= SECONDS_BETWEEN:
            last = now
            listener(Progressed(what, done, total))

    token, other = _heard.set(tell), _listener.set(listener)
    try:
        yield
    finally:
        _heard.reset(token)
        _listener.reset(other)


class Dispatcher:
    """Hands each event to the log of the run, to one local listener, and to the plugins."""

    def __init__(self, manager: pluggy.PluginManager, run: Run, listener: Listener | None) -> None:
        """`listener` is the command line's own progress display, or None."""
        self.manager = manager
        self.run = run
        self.listener = listener
        self._failed: set[str] = set()  # plugins of which it has been said

    def __call__(self, event: Event) -> None:
        """Tell everybody. A plugin that fails costs neither the run nor the others an event, and is named once."""
        self.run.log(event)
        if self.listener is not None:
            self.listener(event)
        given = {"event": event, "run": self.run}
        for hook in reversed(self.manager.hook.on_event.get_hookimpls()):
            try:
                hook.function(*(given[name] for name in hook.argnames))
            except Exception:
                self._say_once(hook.plugin_name, event)

    def _say_once(self, plugin: str, event: Event) -> None:
        """Log the error that is being handled, if it is the first one of a plugin."""
        if plugin not in self._failed:
            self._failed.add(plugin)
            line = "The plugin '%s' failed in on_event(%s). The run goes on, and further errors of it are not shown."
            logging.getLogger("erasekit").warning(line, plugin, type(event).__name__, exc_info=True)
