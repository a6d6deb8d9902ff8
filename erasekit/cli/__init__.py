"""The command line. Results go to stdout, progress and messages to stderr; exit codes are those of `erasekit.errors`."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module

import typer

from erasekit import __version__
from erasekit.errors import ErasekitError
from erasekit.registration.registry import BrokenPlugin

INTERRUPTED = 130
FAILED = 4
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

    app = typer.Typer(
        name="erasekit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
    )
    app.callback()(_root)
    for name in COMMANDS:
        app.command(name)(import_module(f"erasekit.cli.{name}").command)
    add_commands(default(), app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"erasekit {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Erase concepts from text-to-image models, and measure what became of them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        typer.main.get_command(build()).main(args=arguments, prog_name="erasekit")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else FAILED
    except ErasekitError as error:
        if isinstance(error, BrokenPlugin) and error.details:
            typer.echo(error.details, err=True)
        typer.secho(str(error), err=True, fg="red")
        return error.exit_code
    except KeyboardInterrupt:
        typer.echo("Interrupted. Run the same command again to go on from here.", err=True)
        return INTERRUPTED
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        typer.secho(f"This should not have happened: {line}. The traceback is in {_keep_traceback()}.", err=True, fg="red")
        return FAILED
    return 0


def _keep_traceback() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="erasekit-", suffix=".txt", delete=False) as file:
        traceback.print_exc(file=file)
    return file.name


def entry_point() -> None:
    """The console script. Without torchvision, transformers would begin every command with two remarks about it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
