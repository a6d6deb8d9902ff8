"""`erasekit merge`: erasures of different runs as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from erasekit.atomic import sweep_beside
from erasekit.cli import options
from erasekit.cli.ends import put, put_json
from erasekit.cli.matrix import heat
from erasekit.cli.progress import listener
from erasekit.cli.tables import show
from erasekit.errors import UsageError
from erasekit.events import StageStarted, heard
from erasekit.places import check_place

if TYPE_CHECKING:
    from erasekit.runs.together import Together


def command(
    erasures: Annotated[list[Path], typer.Argument(help="The folders of two erasures or more.", show_default=False)],
    task: options.Task = None,
    settings: options.Set = None,
    images: Annotated[
        int,
        typer.Option("--images", min=0, help="Draw so many images of each thing under each erasure too, and judge them."),
    ] = 0,
    files: options.Files = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the erasure is written.")] = Path("merged"),
    force: Annotated[bool, typer.Option("--force", help="Replace an erasure that is there.")] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Put erasures of one base together, and measure what they do to one another."""
    check_place(out)
    sweep_beside(out)
    if out.exists() and not force:
        raise UsageError(f"'{out}' exists. Give another folder with --out, or --force to replace it.")
    if out.resolve() in {folder.resolve() for folder in erasures}:
        raise UsageError(f"'{out}' is one of the erasures. Give another folder with --out.")
    from erasekit.erasures.contents import check_replaceable
    from erasekit.runs.interference import interference
    from erasekit.runs.together import merge

    check_replaceable(out)
    registries, backbone = options.registries(plugin), options.chosen(settings, None).get("backbone", {})
    with listener() as told, heard(told):
        told(StageStarted("merge"))
        found = merge(erasures, task=task or "", backbone=backbone, registries=registries)
        found.erasure.save(out, dtype=files or "float32")
        if images:
            measured = interference([*erasures, out], images, task=task or "", backbone=backbone, registries=registries)
            figures = {**found.erasure.figures, "interference": measured.model_dump(mode="json")}
            replace(found.erasure, figures=figures).save(out, dtype=files or "float32")
    if as_json:
        together = found.erasure.remains.model_dump() if found.erasure.remains else None
        alone = [remains.model_dump() for remains in found.alone]
        put_json({"erasure": str(out), "together": together, "alone": alone})
        return
    _show(found, out)
    if images:
        heat(measured, title=f"Images that show what they were asked for, {images} of each")


def _show(found: Together, out: Path) -> None:
    """Print what of each concept is left alone and with the others, and how far the rest moves."""
    together = found.erasure.remains
    if together is None:
        put(str(out))
        return
    rows = []
    for remains in found.alone:
        for name, left in remains.residual.items():
            rows.append([name, _share(left.most), _share(together.residual[name].most), _share(remains.drift)])
    rows.append(["together", "", "", _share(together.drift)])
    title = f"{out}: what is left, by predictions on validation prompts"
    show(["concept", "left alone", "left together", "drift of what stays"], rows, title=title)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
