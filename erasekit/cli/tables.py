"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from erasekit.cli.ends import delivered, say
from erasekit.texts import shown

if TYPE_CHECKING:
    from erasekit.erasures.erasure import Erasure

WIDTH_OF_A_FILE = 200


def tell(erasure: Erasure) -> None:
    """Print to stderr what an erasure leaves, and its warnings."""
    from erasekit.erasures.remains import UNMEASURED

    say(erasure.remains.line() if erasure.remains else UNMEASURED)
    for line in erasure.warnings:
        say(f"Warning: {line}", "yellow")


def terminal() -> Console:
    """Stdout; a file or a pipe is taken for wide, so that nothing is folded or cut."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", spare: Sequence[str] = ()) -> None:
    """Print a table to stdout; a file or a pipe gets it wide, so that nothing is folded or cut.

    Args:
        columns: their names.
        rows: of cells.
        title: printed above it.
        spare: columns that are left out, one after the other, in a terminal that is too narrow for all.
    """
    console = terminal()
    table, unbounded = _table(columns, rows), console.options.update(width=10_000)
    for name in spare:
        if Measurement.get(console, unbounded, table).maximum > console.width:
            at = list(columns).index(name)
            columns, *rows = ([*row[:at], *row[at + 1 :]] for row in (columns, *rows))
            table = _table(columns, rows)
    with delivered():
        if title:
            console.print(Text(f"\n{shown(title)}", style="bold italic"))
        if Measurement.get(console, unbounded, table).minimum <= console.width:
            console.print(table)
            return
        for row in rows:  # the terminal is too narrow for a table: a line for each cell
            for column, cell in zip(columns, row, strict=True):
                console.print(Text.assemble((f"{column}: ", "bold"), shown(cell)), soft_wrap=True)
            console.print()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table that never cuts a word."""
    table = Table(box=None, pad_edge=False)
    for column, cells in zip(columns, zip(*rows, strict=True) if rows else [()] * len(columns), strict=True):
        table.add_column(Text(column, style="bold"), no_wrap=not any(" " in cell.strip() for cell in cells))
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    return table
