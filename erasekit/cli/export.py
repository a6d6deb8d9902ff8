"""`erasekit export`: an erasure in the form that another program loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import completing, options
from erasekit.cli.ends import put, put_json


def command(
    erasure: Annotated[Path, typer.Argument(help="The folder of an erasure.", show_default=False)],
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORM", help="diffusers, kohya or merged.", autocompletion=completing.names("exporters")),
    ] = "diffusers",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="The file or folder to write.", show_default=False),
    ] = None,
    concept: options.Concept = None,
    strength: options.Strength = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="The most ranks of a layer.", show_default=False)] = None,
    files: options.Files = None,
    settings: options.Set = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Write an erasure as one LoRA for diffusers, as a file for ComfyUI, Forge and A1111 (kohya), or merged into its base."""
    from erasekit.erasures.strength import parse
    from erasekit.runs.exporting import export

    written = export(
        erasure,
        to,
        out,
        concepts=concept or None,
        strength=parse(strength or ()),
        rank=rank,
        dtype=files,
        backbone=options.chosen(settings, None).get("backbone"),
        force=force,
        registries=options.registries(plugin),
    )
    if as_json:
        put_json({"path": str(written.path), **written.costs})
        return
    costs = [f"{name} costs {cost:.1e} of the edit" for name, cost in written.costs.items() if cost]
    put(f"{written.path}{'  ' if costs else ''}{'; '.join(costs)}\n\n{written.load}")
