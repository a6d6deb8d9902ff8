"""How a command ends: whatever stops it is one line on stderr and an exit code."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from erasekit.atomic import disk_full
from erasekit.errors import EnvironmentProblem, ErasekitError
from erasekit.registration.registry import BrokenPlugin
from erasekit.texts import shown

DONE = 0
FAILED = 4
INTERRUPTED = 130


class Interrupted(ErasekitError):
    """Somebody pressed Ctrl-C; says what was kept and how to go on."""

    exit_code = INTERRUPTED


def say(text: str, colour: str | None = None) -> None:
    """Print a message to stderr; in colour where that is wanted, and never with what would steer the terminal."""
    plain = False if os.environ.get("NO_COLOR") else None
    with suppress(OSError):  # stderr is closed or full, and there is nobody to tell
        typer.secho(shown(text), err=True, fg=colour, color=plain)


class ReaderGone(ErasekitError):
    """Whoever read the results has closed the pipe, and has read enough."""

    exit_code = DONE


@contextmanager
def delivered() -> Iterator[None]:
    """What is printed in this block reaches whoever reads stdout.

    Raises:
        ReaderGone: nobody does any more.
        EnvironmentProblem: it cannot be written.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:  # rich makes the one into the other
        _forget_stdout()
        raise ReaderGone from error
    except OSError as error:
        _forget_stdout()
        raise EnvironmentProblem(f"Cannot write to stdout: {error.strerror}. Send the results elsewhere.") from error


def put(text: str) -> None:
    """Print a result to stdout, without what would steer the terminal."""
    with delivered():
        typer.echo(shown(text))


def put_json(value: Any) -> None:
    """Print a result to stdout as JSON."""
    with delivered():
        typer.echo(json.dumps(value, indent=1))


def guarded(command: Callable[..., None], kept: str) -> Callable[..., None]:
    """A command that, when it is interrupted, says what was kept, and that no plugin can end with a code of its own."""

    @functools.wraps(command)
    def call(*arguments: Any, **named: Any) -> None:
        try:
            _see_where_we_are()
            command(*arguments, **named)
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted. {kept}") from None
        except SystemExit as error:
            raise ErasekitError(f"A plugin called sys.exit({error.code!r}) in the midst of the work.{_kept_trace()}") from error

    return call


def _see_where_we_are() -> None:
    """See that the working folder is there: libraries end the process where it is not."""
    try:
        os.getcwd()
    except OSError as error:
        raise EnvironmentProblem("The folder that you are in has been deleted. Change to another one.") from error


def code_of(error: BaseException) -> int:
    """Say what has ended a command, in one line; the exit code that belongs to it."""
    if isinstance(error, ReaderGone) or isinstance(error.__context__, BrokenPipeError):
        _forget_stdout()
        return DONE
    if isinstance(error, ErasekitError):
        if isinstance(error, BrokenPlugin) and error.details:
            say(error.details)
        say(str(error), None if isinstance(error, Interrupted) else "red")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        say("Interrupted.")
        return INTERRUPTED
    if hasattr(error, "format_message"):  # Typer's, of wrong usage; it has no public name
        return _wrong_usage(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if problem := _problem(error):
        say(problem, "red")
        return EnvironmentProblem.exit_code
    line = " ".join(f"{type(error).__name__}: {error}".split())
    say(f"This should not have happened: {line}{_place(error)}.{_kept_trace()}", "red")
    return FAILED


def _place(error: BaseException) -> str:
    """The file and line that it comes from, of erasekit or of a plugin: a library's own lines say little to an author."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not {"site-packages", "lib"} & {*Path(f.filename).parts}]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _wrong_usage(error: Any) -> int:
    """One line for a flag or an argument that is wrong; nothing where the help was shown instead."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ != "NoArgsIsHelpError":
        message = " ".join(error.format_message().split())
        path = getattr(context, "command_path", "erasekit")
        say(f"{message}{'' if message.endswith(('.', '?')) else '.'} See '{path} --help'.", "red")
    return int(error.exit_code)


def _problem(error: BaseException) -> str:
    """What is wrong outside of erasekit, "" if it is something else."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"There is not enough memory{f' ({error})' if str(error) else ''}. Use a smaller batch, size or model."
    if isinstance(error, OSError) and error.strerror:
        where = f"'{error.filename}': " if error.filename else ""
        return f"{where}{error.strerror}.{' Free some space.' if disk_full(error) else ''}"
    return "The disk is full. Free some space, and run the same command again." if disk_full(error) else ""


def _forget_stdout() -> None:
    """Lead stdout to nowhere, or Python would try once more when it ends, and complain."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def _kept_trace() -> str:
    """Where the traceback of the error that is being handled was written, as a sentence; "" if it could not be."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="erasekit-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            traceback.print_exc(file=file)
    except OSError:
        return ""
    return f" The traceback is in {file.name}."
