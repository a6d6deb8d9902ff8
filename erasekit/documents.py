"""Reads JSON files that nobody vouches for: plain files of a bounded size, each with its schema; faults are one line."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from erasekit.errors import EnvironmentProblem

Model = TypeVar("Model", bound=BaseModel)
LARGEST = 2**24  # bytes of a JSON file
KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Damaged(EnvironmentProblem):
    """A file is not what was written."""


def plain_file(path: Path, *, most: int = LARGEST) -> int:
    """See that a path is a plain file of at most `most` bytes, without opening it; its size.

    Raises:
        Damaged: it is something else (a symbolic link, a device, a FIFO), or larger.
        OSError: there is nothing of that name.
    """
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        raise Damaged(f"'{path}' is {kind}; only plain files are read. Copy the files themselves, e.g. with 'cp -RL'.")
    if found.st_size > most:
        raise Damaged(f"'{path}' has {found.st_size} bytes; such a file has at most {most}. It is not read.")
    return found.st_size


def read_document(model: type[Model], path: Path, *, advice: str = "") -> Model:
    """The content of a JSON file, checked against its schema.

    Args:
        model: the schema.
        path: the file.
        advice: what to do if it is damaged.

    Raises:
        Damaged: one line that names the file and the key.
        OSError: it cannot be read.
    """
    plain_file(path)
    try:
        return parse_document(model, path.read_bytes())
    except ValueError as error:
        raise Damaged(f"'{path}' is damaged ({error}).{f' {advice}' if advice else ''}") from error


def parse_document(model: type[Model], content: bytes) -> Model:
    """JSON, checked against its schema.

    Raises:
        ValueError: says where and why, in one line.
    """
    try:
        return model.model_validate(json.loads(content.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_constant))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValidationError as error:
        raise ValueError(fault_of(error)) from None


def fault_of(error: ValidationError) -> str:
    """The first fault that pydantic found, in one line: the key, what is wrong with it, and what was given."""
    fault = error.errors(include_url=False)[0]
    key = ".".join(map(str, fault["loc"]))
    given = "" if fault["type"] == "missing" or isinstance(fault["input"], dict | list) else f", given {fault['input']!r:.80}"
    where, why = f"key '{key}': " if key else "", fault["msg"].removeprefix("Value error, ")
    return " ".join(f"{where}{why[:1].lower()}{why[1:]}{given}".split())


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose keys is there once: readers do not agree on which of two counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"key '{twice}' is there twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
