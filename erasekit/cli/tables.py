"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from erasekit.erasures.erasure import Erasure

WIDTH_OF_A_FILE = 200


def tell(erasure: Erasure) -> None:
    """Print to stderr what an erasure leaves, and its warnings."""
    typer.echo(erasure.remains.line() if erasure.remains else "residual: not measured", err=True)
    for line in erasure.warnings:
        typer.secho(f"Warning: {line}", err=True, fg="yellow")


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print a table to stdout; a file or a pipe gets it wide, so that nothing is folded or cut."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(column, style="bold"))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if title:
        console.print(Text(f"\n{title}", style="bold italic"))
    console.print(table)
