"""`erasekit where`: the folder of a shipped model, or where the hub has another."""

from __future__ import annotations

from typing import Annotated

import typer

from erasekit.cli import completing, options
from erasekit.cli.ends import put


def command(
    backbone: Annotated[
        str,
        typer.Argument(help="A backbone, e.g. sd15-mini.", show_default=False, autocompletion=completing.names("backbones")),
    ],
    plugin: options.Plugin = None,
) -> None:
    """Print what diffusers' `from_pretrained` takes for a backbone: the folder of a shipped model, or an id on the hub."""
    from erasekit.backbones.where import where

    put(where(backbone, options.registries(plugin)))
