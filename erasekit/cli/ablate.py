"""`erasekit ablate`: what each part of a method does, as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import completing, options
from erasekit.cli import sweep as sweeping

KEPT = "Finished runs are kept, and the others go on where they were with the same command."


def command(
    method: Annotated[
        str,
        typer.Argument(
            help="A method; 'erasekit ls methods' has them.", show_default=False, autocompletion=completing.names("methods")
        ),
    ],
    backbone: options.Backbone = None,
    task: options.Task = None,
    concept: options.Concept = None,
    together: Annotated[bool, typer.Option("--together", help="Erase the concepts together, not one by one.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds: 0, 1, ...")] = 1,
    row: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="ROW", help="A row of your own: 'name: method.key=value ...'.", show_default=False),
    ] = None,
    launcher: sweeping.Launcher = "local",
    workers: sweeping.Workers = 0,
    retry: sweeping.Retry = False,
    only: sweeping.Only = None,
    limit: options.Limit = None,
    settings: sweeping.Settings = None,
    vram: options.Vram = None,
    out: options.Out = Path("runs"),
    dry_run: sweeping.DryRun = False,
    report_only: sweeping.ReportOnly = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Measure a method and its declared ablations on the same prompts and seeds, and show how much each row differs."""
    from erasekit.sweeps.suite import of_method

    registries = options.registries(plugin)
    wanted = [tuple(concept)] if together and concept else list(concept or ())
    suite = of_method(
        method,
        registries,
        rows=row or (),
        title=f"What the parts of {method} do",
        backbones=(backbone or "sd15-mini",),
        tasks=(task or "",),
        concepts={task or "": wanted} if wanted else {},
        seeds=range(seeds),
    )
    how = {"launcher": launcher, "workers": workers, "retry": retry, "only": tuple(only or ()), "work": not report_only}
    overrides = options.overrides(settings, vram)
    sweeping.do(suite, f"ablate-{method}", how, limit, overrides, out, plugin, dry_run=dry_run, as_json=as_json)
