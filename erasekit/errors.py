"""The errors a user can meet. Each is one line: what happened, what was given, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ErasekitError(Exception):
    """The run failed (exit code 4)."""

    exit_code = 4


class UsageError(ErasekitError):
    """Wrong usage or configuration (exit code 2)."""

    exit_code = 2


class EnvironmentProblem(ErasekitError):
    """Something outside of the configuration is missing: weights, GPU, memory, disk, login (exit code 3)."""

    exit_code = 3


FEW = 4  # names that an error lists


def unknown(what: str, given: str, known: Iterable[str], see: str) -> UsageError:
    """The error for a name that nobody registered, with the nearest known name, or with all if they are few."""
    names = list(known)
    listed = f" There are: {', '.join(map(repr, names))}." if 0 < len(names) <= FEW else ""
    return UsageError(f"Unknown {what} '{given}'.{nearest(given, names) or listed} See '{see}'.")


def nearest(given: str, known: Iterable[str]) -> str:
    """A question for the nearest known name, to be put behind an error; "" if none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
