"""`erasekit sweep`: a grid of runs from a suite, on this machine or a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from erasekit.cli import completing, options
from erasekit.cli.board import board, failure, summary
from erasekit.cli.ends import put, put_json, say
from erasekit.cli.tables import show
from erasekit.errors import ErasekitError
from erasekit.registration.plugins import Registries
from erasekit.runs.config import parse_overrides

Launcher = Annotated[
    str,
    typer.Option(
        "--launcher", help="What starts the workers: see 'erasekit ls launchers'.", autocompletion=completing.names("launchers")
    ),
]
Workers = Annotated[int, typer.Option("--workers", min=0, help="How many; 0 leaves it to the launcher.")]
Retry = Annotated[bool, typer.Option("--retry", help="Begin again with cells that have failed.")]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="AXIS=PATTERN",
        help="Only some cells, e.g. method=stereo, seed=0, 'concept=cat*'; repeatable. An axis is row, method, backbone, task, "
        "concept or seed.",
        show_default=False,
    ),
]
ReportOnly = Annotated[
    bool, typer.Option("--report-only", help="Begin nothing; write the table and the page of the cells that are finished.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show every cell and how far it is; do nothing.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="A setting of every cell (protocol.steps=20), of one task, method or backbone (on.objects.protocol.steps=20), "
        "or of the launcher (launcher.threads=2).",
        show_default=False,
    ),
]

KEPT = "Finished runs are kept, and the others go on where they were with the same command."


def command(
    suite: Annotated[Path, typer.Argument(help="A TOML file.", show_default=False)],
    launcher: Launcher = "local",
    workers: Workers = 0,
    retry: Retry = False,
    only: Only = None,
    limit: options.Limit = None,
    settings: Settings = None,
    vram: options.Vram = None,
    out: options.Out = Path("runs"),
    dry_run: DryRun = False,
    report_only: ReportOnly = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Do the runs of a suite that are not finished yet, and show their table.

    The same command goes on with a sweep that was stopped. A run that fails stops no other; exit code 4 says that one has.
    """
    from erasekit.sweeps.suite import read_suite

    given = read_suite(suite)
    how = {"launcher": launcher, "workers": workers, "retry": retry, "only": tuple(only or ()), "work": not report_only}
    do(given, suite.stem, how, limit, options.overrides(settings, vram), out, plugin, dry_run=dry_run, as_json=as_json)


def do(
    suite: Any,
    name: str,
    how: dict[str, Any],
    limit: int | None,
    settings: list[str],
    out: Path,
    plugin: list[Path] | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Sweep a suite with what the flags say, and show its table."""
    from erasekit.sweeps.suite import adjusted
    from erasekit.sweeps.sweep import How, sweep

    registries = options.registries(plugin)
    chosen = parse_overrides(settings)
    plugins = tuple(path.resolve() for path in plugin or ())
    launching = How(**how, settings=chosen.pop("launcher", {}), plugins=plugins)
    suite = adjusted(suite, limit=limit, options=chosen)
    if dry_run:
        _show_cells(suite, registries, out, launching.only, as_json=as_json)
        return
    with board() as told:
        swept = sweep(suite, registries, name=name, out=out, how=launching, watch=told)
    _show_table(swept, as_json=as_json)
    write_page(swept, registries)
    if not launching.work:
        say(f"{summary(swept.cells)}.")
    if swept.failed and launching.work:
        lines = [failure(cell, how) for cell, how in swept.failed]
        raise ErasekitError(
            "\n".join([*lines, f"{summary(swept.cells)}. Remove the cause, and run the same command with --retry."])
        )


def _show_cells(suite: Any, registries: Registries, out: Path, only: Sequence[str], *, as_json: bool) -> None:
    """Print every cell, where its run lies, and how far it is."""
    from erasekit.sweeps.cells import cells_of, chosen, seen

    cells = [(cell, seen(cell, out)) for cell in chosen(cells_of(suite, registries, out), only)]
    if as_json:
        records = [{"row": c.row, "path": c.path, "config": c.config, **how._asdict()} for c, how in cells]
        put_json(records)
        return
    show(["row", "cell", "state", "run"], [[c.row, c.place(), how.error or how.state, c.path] for c, how in cells])
    put(summary(cells))


def _show_table(swept: Any, *, as_json: bool) -> None:
    """Write the sweep's table into its folder, and print it."""
    from erasekit.atomic import replacing
    from erasekit.runs.rundir import write_json
    from erasekit.sweeps.table import by_attack, by_difference, by_row, markdown, tables_of

    tables = tables_of([cell for cell, _ in swept.cells if cell.path], swept.out)
    content = {"title": swept.suite.title, "suite": swept.suite.model_dump(mode="json"), "tables": tables}
    write_json(swept.folder / "table.json", content)
    parts = [f"# {swept.suite.title or swept.folder.name}"]
    for number, table in enumerate(tables):
        heading = f"{table['task']} on {table['backbone']}"
        if any((other["task"], other["backbone"]) == (table["task"], table["backbone"]) for other in tables[:number]):
            heading += ", measured by another protocol"
        shown = [of(table["rows"]) for of in (by_row, by_difference, by_attack)]
        parts += [f"## {heading}", *(markdown(each) for each in shown if each.rows)]
        for each in shown if not as_json else []:
            if each.rows:
                show(*each, title=heading)
    with replacing(swept.folder / "table.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if as_json:
        put_json(content)
    say(f"Table: {swept.folder / 'table.md'}")


def write_page(swept: Any, registries: Registries) -> None:
    """Write the page that compares the rows of a sweep, where there is something to compare."""
    from erasekit.evaluation.results import read_result
    from erasekit.runs.pages.comparison import Compared, write_comparison
    from erasekit.runs.resolve import resolve
    from erasekit.sweeps.cells import run_config

    runs = []
    for cell, how in swept.cells:
        if how.state == "finished":
            path = swept.out / cell.path
            task = resolve(run_config(cell), registries).task
            runs.append(Compared(cell.row, path, task, read_result(path / "results.json")))
    if len(runs) > 1:
        page = write_comparison(runs, swept.folder / "comparison.html", title=swept.suite.title)
        say(f"Page: {page}")
