"""`erasekit plugins`: what was found, and what is wrong with it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from erasekit.cli import completing, options
from erasekit.cli.ends import delivered, put_json
from erasekit.errors import unknown
from erasekit.registration.plugins import PluginInfo, default, load
from erasekit.texts import shown

COLOURS = {"ok": "green", "broken": "red", "disabled": "yellow"}


def command(
    name: Annotated[
        str,
        typer.Argument(
            help="Show one plugin, with its traceback if it is broken.", show_default=False, autocompletion=completing.plugins
        ),
    ] = "",
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """List plugins, one line each; a broken one says why."""
    found = (load(plugin) if plugin else default()).found
    if name:
        found = [p for p in found if p.name == name]
        if not found:
            raise unknown("plugin", name, [p.name for p in default().found], "erasekit plugins")
    if as_json:
        put_json([asdict(p) for p in found])
        return
    with delivered():
        console = Console(soft_wrap=True)
        for info in found:
            console.print(_line(info))
            if name and info.details:
                console.print(Text(shown(info.details)))


def _line(info: PluginInfo) -> Text:
    reason = f"  {info.error}" if info.error else ""
    return Text(shown(f"{info.name}  {info.source}  {info.status}{reason}"), style=COLOURS[info.status])
