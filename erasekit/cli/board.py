"""Shows a sweep on stderr while it goes on: a live table on a terminal, a line for each cell that ends elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import median
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from erasekit.cli.ends import say
from erasekit.cli.progress import duration
from erasekit.sweeps.cells import Cell, Seen

Cells = Sequence[tuple[Cell, Seen]]
SHOWN = 12  # cells at work, and failed ones


class LiveTable:
    """A line for each row of the table, the cells that are worked on, and the time that is left."""

    def __init__(self) -> None:
        """Draw on stderr."""
        self._live = Live(console=Console(stderr=True), auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def __call__(self, cells: Cells) -> None:
        """Draw how far the cells are."""
        table = Table(box=None, pad_edge=False)
        for column in ("row", "finished", "failed", "s each"):
            table.add_column(column, justify="left" if column == "row" else "right")
        for row in dict.fromkeys(cell.row for cell, _ in cells):
            seen = [how for cell, how in cells if cell.row == row]
            seconds = [how.seconds for how in seen if how.state == "finished"]
            ended = [sum(how.state == state for how in seen) for state in ("finished", "failed")]
            usual = f"{median(seconds):.0f}" if seconds else ""
            table.add_row(Text(row), f"{ended[0]}/{len(seen)}", str(ended[1] or ""), usual)
        now = [f"{cell.row}: {cell.place()}: {how.stage}" for cell, how in cells if how.state == "begun"]
        lines = [Text(line, style="dim") for line in now[:SHOWN]]
        lines += [Text(failure(cell, how), style="red") for cell, how in cells if how.state == "failed"][:SHOWN]
        self._live.update(Group(table, *lines, Text(summary(cells), style="bold")), refresh=True)


class Ends:
    """A line for each cell that ends."""

    def __init__(self) -> None:
        """Nothing has ended yet."""
        self._told: set[Cell] = set()
        self._first = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def __call__(self, cells: Cells) -> None:
        """Write what has ended since the last time."""
        new = [(cell, how) for cell, how in cells if how.state in ("finished", "failed") and cell not in self._told]
        self._told |= {cell for cell, _ in new}
        if self._first:
            _write(f"{summary(cells)}")
        for cell, how in [] if self._first else new:
            if how.state == "failed":
                _write(failure(cell, how))
            else:
                _write(f"{cell.row}: {cell.place()}: {how.seconds:.0f} s. {summary(cells)}")
        self._first = False


def board() -> LiveTable | Ends:
    """What fits stderr."""
    return LiveTable() if sys.stderr.isatty() else Ends()


def failure(cell: Cell, how: Seen) -> str:
    """A cell without numbers, and why."""
    said = how.error or "not done"
    return f"FAILED {cell.row}: {cell.place()}: {said}"


def summary(cells: Cells) -> str:
    """How many cells are finished, and about how long the others will take."""
    states = [how.state for _, how in cells]
    failed = f", {states.count('failed')} failed" if "failed" in states else ""
    return f"{states.count('finished')} of {len(cells)} cells finished{failed}{_time_left(cells)}"


def _time_left(cells: Cells) -> str:
    """The time left, as cells of the same row took; "" while nothing is known."""
    known: dict[str, list[float]] = {}
    for cell, how in cells:
        if how.state == "finished":
            known.setdefault(cell.row, []).append(how.seconds)
    left = [cell for cell, how in cells if how.state in ("waiting", "begun")]
    if not known or not left:
        return ""
    usual = median(seconds for of_row in known.values() for seconds in of_row)
    total = sum(median(known[cell.row]) if cell.row in known else usual for cell in left)
    at_work = max(1, sum(how.state == "begun" for _, how in cells))
    return f", about {duration(total / at_work)} left"


def _write(line: str) -> None:
    say(line)
