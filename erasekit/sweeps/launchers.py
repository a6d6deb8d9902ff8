"""What starts the workers of a sweep: on this machine, or on a cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from erasekit.settings import Settings


class LauncherConfig(Settings):
    """Base of every launcher's settings: frozen, and unknown keys are errors."""


@dataclass(frozen=True)
class Job:
    """What a launcher's workers are to do: `erasekit.sweeps.worker.work`, each with a number of its own.

    Attributes:
        folder: the sweep's, with its cells.
        out: where runs are kept; every worker sees it under this path.
        plugins: plugin files, which every worker sees too.
        workers: how many to start; 0 leaves it to the launcher.
        where: the folder that relative paths of the suite begin in.
    """

    folder: Path
    out: Path
    plugins: tuple[Path, ...] = ()
    workers: int = 0
    where: Path = field(default_factory=Path.cwd)


class Launcher(Protocol):
    """Starts workers, and says how they are. A worker that ends because no cell is left for it is done.

    Attributes:
        Config: its settings (`-s launcher.key=value`).
        elsewhere: whether workers may run on other machines than this one.
    """

    Config: ClassVar[type[LauncherConfig]]
    elsewhere: ClassVar[bool]

    def __init__(self, config: Any, job: Job) -> None:
        """Take the settings and the job; nothing starts yet.

        Raises:
            EnvironmentProblem: what the launcher needs is not installed, or cannot be reached.
        """

    def start(self) -> None:
        """Start the workers; again, when all have ended and there are cells left that nobody is at work on."""

    def alive(self) -> int:
        """How many workers are at work or waiting to be; those that were lost are started again.

        Raises:
            ErasekitError: workers cannot work.
        """

    def stop(self) -> None:
        """End all workers, wherever they are; each closes the run that it has open, if there is time."""
