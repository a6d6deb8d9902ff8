"""`erasekit report`: show finished runs, and write their reports again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import options
from erasekit.cli.tables import show
from erasekit.errors import ErasekitError
from erasekit.registration.plugins import Registries


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)],
    reveal: Annotated[bool, typer.Option("--reveal", help="Do not blur images.")] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Show the numbers of runs side by side, and write the report of each again."""
    from erasekit.evaluation.results import compare, read_result, table
    from erasekit.runs.pages.report import write_report

    results = [read_result(folder / "results.json") for folder in runs]
    registries = options.registries(plugin)
    for folder, result in zip(runs, results, strict=True):
        if (folder / "scores.parquet").is_file():
            task = registries.tasks.get(result.task, result.domain)
            known = task() if isinstance(task, type) else task
            path = write_report(folder, known, reveal=reveal, meanings=_meanings(registries, result.method))
            typer.echo(f"Report: {path}", err=True)
    if as_json:
        typer.echo(json.dumps([r.model_dump(mode="json") for r in results], indent=1))
    else:
        show(*(table(results[0]) if len(results) == 1 else compare(results)))


def _meanings(registries: Registries, method: str) -> Mapping[str, str]:
    """What a method's training curves mean; nothing of one whose plugin is not installed."""
    try:
        found: Mapping[str, str] = registries.methods.get(method).curves
    except ErasekitError:
        return {}
    return found
