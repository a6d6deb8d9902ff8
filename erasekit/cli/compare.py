"""`erasekit compare`: finished runs in one table, or what keeps them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import options
from erasekit.cli.tables import show
from erasekit.errors import UsageError


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)],
    published: Annotated[bool, typer.Option("--published", help="Add rows of papers that measured alike.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX (booktabs).")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    as_json: options.Json = False,
) -> None:
    """Compare runs that were measured alike: means over concepts and seeds, and paired differences from the first row.

    Runs of unlike protocols are refused, with what differs.
    """
    from erasekit.sweeps import compared, table

    if as_markdown + as_latex + as_csv + as_json > 1:
        raise UsageError("--markdown, --latex, --csv and --json are one choice. Give one of them.")
    rows = compared.compared_rows(runs)
    papers, reasons = compared.published(runs[0]) if published else ({}, [])
    for reason in reasons:
        typer.echo(f"Published rows left out: {reason}.", err=True)
    if published and not papers:
        typer.echo("No published row was measured as these runs were.", err=True)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "published": papers, "left_out": reasons}, indent=1))
        return
    formats = [(as_markdown, table.markdown), (as_latex, table.latex), (as_csv, table.as_csv)]
    printed = next((how for wanted, how in formats if wanted), None)
    for each in (table.by_row(rows, papers), table.by_difference(rows), table.by_attack(rows)):
        if each.rows and printed:
            typer.echo(printed(each) + "\n")
        elif each.rows:
            show(*each)
