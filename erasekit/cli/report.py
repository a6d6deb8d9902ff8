"""`erasekit report`: show finished runs, and write their reports again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from erasekit.cli import options
from erasekit.cli.ends import put_json, say
from erasekit.cli.tables import show
from erasekit.errors import ErasekitError, UsageError
from erasekit.registration.plugins import Registries
from erasekit.runs.config import RunConfig, build

if TYPE_CHECKING:
    from erasekit.evaluation.results import RunResult
    from erasekit.evaluation.tasks import Task


def task_of(folder: Path, registries: Registries, result: RunResult) -> Task:
    """The task of a run; of one that is not here any more its name, and blurred images."""
    from erasekit.evaluation.finding import find_task
    from erasekit.evaluation.tasks import Task

    written = folder / "config.toml"
    try:
        config = build({}, file=written) if written.is_file() else RunConfig(task=result.task)
        return find_task(config.task or result.task, result.domain, registries, config.options.task)
    except ErasekitError as error:
        say(f"{error} The images of '{folder}' are blurred unless --reveal is given.", "yellow")
        task = Task()
        task.__dict__.update(name=result.task, blurred=True)
        return task


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)],
    page: Annotated[bool, typer.Option("--page", help="Write one page that compares the runs, in place of theirs.")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where --page writes it.")] = Path("comparison.html"),
    reveal: Annotated[bool, typer.Option("--reveal", help="Do not blur images.")] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Show the numbers of runs side by side, and write the report of each again."""
    from erasekit.evaluation.results import compare, read_result, table
    from erasekit.runs.pages.comparison import compared, write_comparison
    from erasekit.runs.pages.report import write_report

    results = [read_result(folder / "results.json") for folder in runs]
    registries = options.registries(plugin)
    if page and len(runs) < 2:
        raise UsageError("--page compares runs: give two or more. A run has a page of its own, report.html.")
    known = list(zip(runs, (task_of(f, registries, r) for f, r in zip(runs, results, strict=True)), strict=True))
    if page:
        say(f"Page: {write_comparison(compared(known), out, reveal=reveal)}")
    for (folder, task), result in zip(known, results, strict=True) if not page else ():
        if (folder / "scores.parquet").is_file():
            path = write_report(folder, task, reveal=reveal, meanings=meanings_of(registries, result.method))
            say(f"Report: {path}")
    if as_json:
        put_json([r.model_dump(mode="json") for r in results])
    elif len(results) == 1:
        show(*table(results[0]), spare=("evaluator", "better"))
    else:
        show(*compare(results))


def meanings_of(registries: Registries, method: str) -> Mapping[str, str]:
    """What a method's training curves mean; nothing of one whose plugin is not installed."""
    try:
        found: Mapping[str, str] = registries.methods.get(method).curves
    except ErasekitError:
        return {}
    return found
