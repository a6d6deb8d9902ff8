"""`erasekit new`: the beginning of a plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import completing, options
from erasekit.registration.scaffold import KINDS, scaffold


def command(
    kind: Annotated[
        str,
        typer.Argument(
            help="method, backbone, task, evaluator or attack.", show_default=False, autocompletion=completing.one_of(*KINDS)
        ),
    ],
    name: Annotated[str, typer.Argument(help="What it is called, e.g. my-method.", show_default=False)],
    single_file: Annotated[
        bool, typer.Option("--single-file", help="One file in place of a package.", show_default=False)
    ] = False,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where it is written.")] = Path(),
) -> None:
    """Write a plugin that works and passes its contract test, to be changed from there."""
    written = scaffold(kind, name, out, options.registries(None), single_file=single_file)
    for path in written.files:
        typer.echo(path)
    typer.echo(f"Test it:  {written.test}\nUse it:   {written.use}", err=True)
