"""`erasekit strength`: an erasure measured at several strengths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import options
from erasekit.cli.ends import put_json
from erasekit.cli.progress import listener
from erasekit.cli.report import meanings_of, task_of
from erasekit.cli.tables import show
from erasekit.events import StageStarted, heard


def command(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.", show_default=False)],
    at: Annotated[
        list[float] | None,
        typer.Option(
            "--at", metavar="NUMBER", help="A strength; repeatable.  [default: 0 to 1.5 in quarters]", show_default=False
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The most images per prompt set.")] = 20,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Draw and judge a run's prompts at several strengths of its erasure: how much is gone, and what it costs."""
    from erasekit.evaluation.results import number, read_result
    from erasekit.runs.pages.report import write_report
    from erasekit.runs.strengths import STRENGTHS, measure_strength

    registries, result = options.registries(plugin), read_result(run / "results.json")
    with listener() as told, heard(told):
        told(StageStarted("strength"))
        found = measure_strength(run, at or STRENGTHS, limit=limit, registries=registries, listener=told)
    if (run / "scores.parquet").is_file():
        write_report(run, task_of(run, registries, result), meanings=meanings_of(registries, result.method))
    if as_json:
        put_json(found.model_dump(mode="json"))
        return
    strengths = sorted({point.strength for curve in found.curves for point in curve.points})
    values = {curve.metric: {point.strength: point.value for point in curve.points} for curve in found.curves}
    rows = [[f"{s:g}", *(number(values[name].get(s)) for name in values)] for s in strengths]
    show(["strength", *values], rows, title=f"{', '.join(found.concepts)}, at most {limit} images per prompt set")
