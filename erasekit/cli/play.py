"""`erasekit play`: try an erasure in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import options
from erasekit.cli.ends import say


def command(
    erasure: Annotated[Path, typer.Argument(help="The folder of an erasure.", show_default=False)],
    beside: Annotated[
        Path | None,
        typer.Option(
            "--beside", metavar="FOLDER", help="Another erasure of the same base, shown beside it.", show_default=False
        ),
    ] = None,
    settings: options.Set = None,
    vram: options.Vram = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on; others than this machine's let others in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port to listen on.")] = 7860,
    reveal: Annotated[bool, typer.Option("--reveal", help="Do not blur images of sexual prompts.")] = False,
    plugin: options.Plugin = None,
) -> None:
    """Type prompts in a browser: the base beside the erased model, a strength for each concept. Ends with Ctrl-C."""
    from erasekit.runs.play import gradio, page, serve
    from erasekit.runs.playground import Playground

    gradio()  # before anything is loaded
    chosen = options.chosen(settings, vram)
    playground = Playground(
        [erasure, *([beside] if beside else [])],
        backbone=chosen.get("backbone"),
        protocol=chosen.get("protocol"),
        reveal=reveal,
        registries=options.registries(plugin),
    )
    app = page(playground)
    say(f"http://{host}:{port}  (Ctrl-C ends it)")
    serve(app, host=host, port=port)
