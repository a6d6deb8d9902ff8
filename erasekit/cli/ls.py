"""`erasekit ls`: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from erasekit.cli import completing, options
from erasekit.cli.ends import put_json
from erasekit.cli.tables import show
from erasekit.errors import unknown

COLUMNS = ["name", "aliases", "summary", "paper", "plugin"]


def command(
    kind: Annotated[
        str, typer.Argument(help="backbones, methods, ...; left out: all", show_default=False, autocompletion=completing.kinds)
    ] = "",
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """List what is registered: names, what they are, and which plugin they come from."""
    kinds = {names.plural: names.entries() for names in options.registries(plugin).all()}
    if kind and kind not in kinds:
        raise unknown("kind", kind, kinds, "erasekit ls --help")
    chosen = {k: entries for k, entries in kinds.items() if k == kind or (not kind and entries)}
    cells = {
        k: [[e.name, ", ".join(e.aliases), e.summary, e.paper, f"{e.plugin} ({e.source})"] for e in entries]
        for k, entries in chosen.items()
    }
    if as_json:
        put_json({k: [dict(zip(COLUMNS, row, strict=True)) for row in rows] for k, rows in cells.items()})
        return
    for k, rows in cells.items():
        used = [i for i, column in enumerate(COLUMNS) if column in ("name", "summary", "plugin") or any(row[i] for row in rows)]
        show([COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows], title=k)
