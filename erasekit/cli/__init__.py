"""The command line. Results go to stdout, progress and messages to stderr; exit codes are those of `erasekit.errors`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module

import typer

from erasekit import __version__
from erasekit.cli.ends import INTERRUPTED, code_of, delivered, guarded, put

UNCHANGED = "Nothing was changed."
COMMANDS = (  # in the order of the help, each a module with a function `command`
    "run",
    "erase",
    "generate",
    "play",
    "evaluate",
    "attack",
    "verify",
    "strength",
    "export",
    "merge",
    "push",
    "report",
    "compare",
    "sweep",
    "ablate",
    "ls",
    "where",
    "plugins",
    "new",
    "doctor",
)


def build() -> typer.Typer:
    """The application with its own commands and those of plugins."""
    from erasekit.registration.plugins import add_commands, default

    app = typer.Typer(name="erasekit", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_root)
    for name in COMMANDS:
        module = import_module(f"erasekit.cli.{name}")
        app.command(name)(guarded(module.command, getattr(module, "KEPT", UNCHANGED)))
    add_commands(default(), app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        put(f"erasekit {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Erase concepts from text-to-image models, and measure what became of them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Whatever stops it is one line on stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else two remarks about torchvision begin every command
    try:
        try:
            ended = typer.main.get_command(build()).main(args=arguments, prog_name="erasekit", standalone_mode=False)
            with delivered():
                pass
            return ended if isinstance(ended, int) else 0
        except BaseException as error:
            return code_of(error)
    except KeyboardInterrupt:  # a second time, while the first one was told
        return INTERRUPTED
