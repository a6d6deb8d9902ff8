"""A sweep: the cells of a suite, handed to workers, watched until all have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout

from erasekit.atomic import lock_of
from erasekit.errors import ErasekitError, UsageError
from erasekit.places import check_place
from erasekit.registration.plugins import Registries
from erasekit.runs.config import settings_of
from erasekit.runs.resolve import resolve
from erasekit.sweeps.cells import Cell, Seen, cells_of, chosen, give_another_chance, run_config, seen, write_cells
from erasekit.sweeps.launchers import Job
from erasekit.sweeps.suite import Suite

POLL_S = 1.0
ENDED = ("failed", "finished")
Watch = Callable[[Sequence[tuple[Cell, Seen]]], None]


@dataclass(frozen=True)
class How:
    """How a sweep is worked on; none of it decides a number.

    Attributes:
        launcher: the registered name of what starts the workers.
        settings: the launcher's.
        workers: how many; 0 leaves it to the launcher.
        retry: begin again with cells that have failed.
        plugins: plugin files, for the workers.
        only: which cells, of `cells.chosen`; none for all.
        work: if not, nothing is begun.
    """

    launcher: str = "local"
    settings: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 0
    retry: bool = False
    plugins: tuple[Path, ...] = ()
    only: tuple[str, ...] = ()
    work: bool = True


@dataclass(frozen=True)
class Swept:
    """A sweep that has ended.

    Attributes:
        suite: what was asked for.
        folder: where its table is.
        out: where its runs are.
        cells: every cell, and how far it is: ended, unless nobody was to work.
    """

    suite: Suite
    folder: Path
    out: Path
    cells: list[tuple[Cell, Seen]]

    @property
    def failed(self) -> list[tuple[Cell, Seen]]:
        """The cells without numbers."""
        return [(cell, how) for cell, how in self.cells if how.state != "finished"]


def sweep(
    suite: Suite, registries: Registries, *, name: str, out: Path, how: How | None = None, watch: Watch = lambda cells: None
) -> Swept:
    """Do what is missing of a suite, and return when every cell has ended.

    Finished cells are not done again, whoever has done them; those that were begun go on; failed ones stay so, unless they
    are to be retried. Any number of sweeps may share `out`: a run is worked on by one process at a time, and so computed once.

    Args:
        suite: the grid.
        registries: what names stand for.
        name: the suite's, for its folder under `out/sweeps`.
        out: where runs are kept.
        how: who works on it.
        watch: is told about once a second how far every cell is.

    Raises:
        UsageError: something in the suite or the launcher's settings is wrong.
        EnvironmentProblem: the launcher cannot be used here.
        ErasekitError: workers cannot work.
    """
    how = how or How()
    launcher = registries.launchers.get(how.launcher)
    settings = settings_of(launcher.Config, how.settings, "launcher.")
    check_place(out)
    cells = chosen(cells_of(suite, registries, out), how.only)
    if launcher.elsewhere:
        check_gpus(cells, registries)
    folder = write_cells(cells, out, name)
    if how.retry and how.work:
        give_another_chance(cells, out)
    board = Board(cells, out)
    if how.work and (left := board.left()):
        workers = min(how.workers, len(left))
        _work(launcher(settings, Job(folder.resolve(), out.resolve(), how.plugins, workers)), board, watch)
    return Swept(suite, folder, out, board.look())


class Board:
    """How far all cells are. One that has ended is not looked at again."""

    def __init__(self, cells: Sequence[Cell], out: Path) -> None:
        """Nothing is known yet."""
        self.cells, self.out = cells, out
        self._ended: dict[Cell, Seen] = {}

    def look(self) -> list[tuple[Cell, Seen]]:
        """Every cell, and how far it is."""
        found = [(cell, self._ended.get(cell) or seen(cell, self.out)) for cell in self.cells]
        self._ended |= {cell: how for cell, how in found if how.state in ENDED}
        return found

    def left(self) -> list[Cell]:
        """The cells that have not ended."""
        return [cell for cell, how in self.look() if how.state not in ENDED]


def _work(launcher: Any, board: Board, watch: Watch) -> None:
    """Start workers, and go on as long as there are cells that somebody is at work on or could be."""
    before: list[Cell] = []
    try:
        launcher.start()
        while left := board.left():
            watch(board.look())
            free = [] if launcher.alive() else [cell for cell in left if _is_free(board.out / cell.path)]
            if free and (free := [cell for cell in board.left() if cell in free]):
                if free == before:
                    raise ErasekitError(f"The workers end without having done '{free[0].path}'. See their logs.")
                before = free
                launcher.start()
            time.sleep(POLL_S)
        watch(board.look())
    finally:
        launcher.stop()


def _is_free(path: Path) -> bool:
    """Whether nobody is at work on a run."""
    try:
        with lock_of(path).acquire(timeout=0):
            return True
    except Timeout:
        return False


def check_gpus(cells: Sequence[Cell], registries: Registries) -> None:
    """See that a run has one name on all machines: what fits a GPU decides the batch, and with it the name.

    Raises:
        UsageError: the suite leaves it to each machine.
    """
    for cell in cells:
        plan = None if cell.refused else resolve(run_config(cell), registries)
        if plan and plan.backbone.domain != "mini" and plan.backbone_config.vram == "auto":
            raise UsageError(
                f"Say for which GPU the runs on '{cell.config['backbone']}' are, since other machines work on them: --vram 80, "
                f"or run.options.backbone.vram = '80' in the suite."
            )
