"""A worker: takes one cell after the other until none is left to take. Any number of them share a folder of runs."""

from __future__ import annotations

import _thread
import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasekit.errors import ErasekitError
from erasekit.registration.plugins import Registries, load
from erasekit.runs.kept import Kept
from erasekit.runs.rundir import AtWork, mark, read_status
from erasekit.runs.runner import run
from erasekit.sweeps.cells import Cell, read_cells, run_config, seen

STARTS = 3  # of one stage of a cell, before it is taken for what kills its process
GRACE_S = 10.0  # for closing the run that is open
INTERRUPTED = 130


def work(
    folder: Path, out: Path, *, plugins: Sequence[Path] = (), number: int = 0, of: int = 1, where: Path | None = None
) -> int:
    """Do the cells of a sweep that nobody else is at work on; how many this worker has done.

    A cell that fails says so in its run directory, and the next one is taken. A cell that another process has open is left
    to it: who finds nothing to take ends, and whoever has started it sees whether another one is needed.

    Args:
        folder: the sweep's.
        out: where runs are kept.
        plugins: plugin files.
        number: this worker's, from 0: each begins elsewhere.
        of: how many there are.
        where: the folder that relative paths of the suite begin in, for a worker that was started elsewhere.
    """
    if where is not None:
        os.chdir(where)
    registries, kept = load(plugins), Kept()
    cells = list({cell.path: cell for cell in read_cells(folder) if not cell.refused}.values())
    first, done = number * len(cells) // of, 0
    left, model = [*cells[first:], *cells[:first]], ""
    while left:
        cell = next((cell for cell in left if _model(cell) == model), left[0])
        left.remove(cell)
        if _taken(cell, out, kept, registries):
            model, done = _model(cell), done + 1
    return done


def _model(cell: Cell) -> str:
    """What a cell loads: the next one that loads the same is the cheapest."""
    return json.dumps([cell.config["backbone"], cell.config.get("options", {}).get("backbone", {})], sort_keys=True)


def _taken(cell: Cell, out: Path, kept: Kept, registries: Registries) -> bool:
    """Do a cell, unless it has ended or another process is at work on it; whether it was this one's."""
    if seen(cell, out).state in ("finished", "failed"):
        return False
    path = out / cell.path
    try:
        if read_status(path).get("starts", 0) >= STARTS:
            raise ErasekitError(f"Its process was lost {STARTS} times in one stage (see log.jsonl): memory, or a crash.")
        run(run_config(cell), out=out, registries=registries, kept=kept)
    except AtWork:
        return False
    except Exception as error:  # whatever it is, it is this cell's, and must not stop the rest
        _note(path, error)
    return True


def _note(path: Path, error: Exception) -> None:
    """Say in a run directory why its run has failed; what nobody foresaw with its traceback."""
    line = str(error) if isinstance(error, ErasekitError) else f"{type(error).__name__}: {error}"
    mark(path, "failed", " ".join(line.split()))
    if not isinstance(error, ErasekitError):
        (path / "traceback.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")


def _end_with(parent: Any) -> None:
    """End this process, in order if there is time, when the one is gone that holds the other end of the pipe."""

    def wait() -> None:
        parent.read()
        _thread.interrupt_main()
        time.sleep(GRACE_S)
        os._exit(INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


def leave_in_order(*_: Any) -> None:
    """On SIGTERM: end as on Ctrl-C, so that the run that is open is closed."""
    raise KeyboardInterrupt


def main() -> None:
    """Work as `python -m erasekit.sweeps.worker`, started by a launcher that holds the pipe of its standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--plugin", type=Path, action="append", default=[])
    given = parser.parse_args()
    _end_with(sys.stdin)
    signal.signal(signal.SIGTERM, leave_in_order)
    try:
        work(given.folder, given.out, plugins=given.plugin, number=given.number, of=given.of)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
