"""`erasekit evaluate --matrix`: each concept of a task is erased in turn, and all are measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from erasekit.cli.board import board, failure, summary
from erasekit.cli.ends import delivered, put_json
from erasekit.cli.sweep import write_page
from erasekit.cli.tables import terminal
from erasekit.errors import ErasekitError
from erasekit.runs.config import RunConfig
from erasekit.texts import shown

if TYPE_CHECKING:
    from erasekit.evaluation.curves import Interference
    from erasekit.registration.plugins import Registries

PALE, DARK = (255, 255, 255), (33, 92, 160)  # of a share of 0, and of 1
UNLIMITED = 100_000  # columns, to see how many a table needs
READABLE = 0.55  # the share from which white ink is read better than black


def matrix(
    config: RunConfig, registries: Registries, *, out: Path, workers: int, plugins: tuple[Path, ...], as_json: bool
) -> None:
    """Do what is missing of the runs, and show what each erasure does to all concepts."""
    from erasekit.sweeps.matrix import matrix_of, matrix_suite
    from erasekit.sweeps.sweep import How, sweep

    suite = matrix_suite(config, registries)
    with board() as told:
        how = How(workers=workers, retry=True, plugins=plugins)
        swept = sweep(suite, registries, name=f"matrix-{suite.methods[0]}", out=out, how=how, watch=told)
    lines = [failure(cell, ended) for cell, ended in swept.failed]
    if len(lines) == len(swept.cells):
        raise ErasekitError("\n".join(lines))
    measured = matrix_of(swept)
    write_page(swept, registries)
    if as_json:
        runs = {", ".join(cell.config["concepts"]): str(out / cell.path) for cell, _ in swept.cells}
        put_json(measured.model_dump(mode="json") | {"runs": runs})
    else:
        heat(measured, title=suite.title)
    if lines:
        raise ErasekitError("\n".join([*lines, f"{summary(swept.cells)}. Remove the cause, and run the same command again."]))


def heat(measured: Interference, *, title: str) -> None:
    """Print a matrix: a row for each erasure, a column for what was asked for, numbered where their names have no room."""
    console = terminal()
    numbers = {name: str(i + 1) for i, name in enumerate(measured.asked)}
    table = _table(measured, {name: name for name in measured.asked}, {})
    named = Measurement.get(console, console.options.update(width=UNLIMITED), table).minimum <= console.width
    if not named:
        table = _table(measured, numbers, numbers)
    with delivered():
        console.print(Text(f"\n{shown(title)}", style="bold italic"))
        console.print(table)
        console.print(Text("Shares of images that show what they were asked for. * is what the row erased."))
        if not named:
            console.print(Text(shown(", ".join(f"{i} {name}" for name, i in numbers.items()))))


def _table(measured: Interference, columns: dict[str, str], rows: dict[str, str]) -> Table:
    from erasekit.runs.pages.heat import own

    table = Table(box=None, pad_edge=False)
    for column in ("erased", *(columns[name] for name in measured.asked)):
        table.add_column(Text(shown(column), style="bold"), justify="left" if column == "erased" else "right")
    if measured.base:
        table.add_row("nothing", *(_cell(value, framed=False) for value in measured.base))
    for name, values in zip(measured.erased, measured.values, strict=True):
        cells = [_cell(v, framed=own(name, asked)) for v, asked in zip(values, measured.asked, strict=True)]
        table.add_row(Text(shown(f"{rows[name]} {name}" if name in rows else name)), *cells)
    return table


def _cell(value: float | None, *, framed: bool) -> Text:
    """A share with its shade; the numbers say the same without colours."""
    if value is None:
        return Text("-")
    share = min(1.0, max(0.0, value))
    shade = ",".join(str(round(a + (b - a) * share)) for a, b in zip(PALE, DARK, strict=True))
    ink = "white" if share >= READABLE else "black"
    return Text(f"{value:.2f}{'*' if framed else ' '}", style=f"{'bold ' if framed else ''}{ink} on rgb({shade})")
