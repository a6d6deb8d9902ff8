"""`python -m erasekit`, and the console script. It imports nothing before it can be interrupted without a traceback."""

from __future__ import annotations

import os
import sys


def entry_point() -> None:
    """Run the command line, and end with its exit code."""
    try:
        _streams()
        from erasekit.cli import main

        code = main()
    except KeyboardInterrupt:  # while modules were imported
        code = 130
        sys.stderr.write("Interrupted.\n")
    sys.exit(code)


def _streams() -> None:
    """See that whatever is said can be written: to a stream that was closed, or in a locale that lacks a letter."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # else the next file that is opened would take its place
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


if __name__ == "__main__":
    entry_point()
