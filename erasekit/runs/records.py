"""What lies in a run directory beside results: the form of each file, and how it is read when nobody vouches for it.

A damaged file that can be made again (status, certificate) or done without (environment, a line of the log) is taken as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from erasekit.documents import LARGEST, Damaged, plain_file, read_document
from erasekit.texts import Line

Model = TypeVar("Model", bound=BaseModel)
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
LONGEST_LOG = 2**28  # bytes


class Status(BaseModel):
    """The content of status.json."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    state: Literal["running", "failed", "finished"]
    finished: list[str] = Field(default_factory=list, description="stages that are done")
    timings_s: dict[str, float] = Field(default_factory=dict, description="seconds of each stage, over all attempts")
    starts: int = Field(0, ge=-1, description="how often it was begun since a stage was last finished")
    error: str = ""


class Computed(BaseModel):
    """The content of computed.json: the erasure that a run has, which run has computed it, and what that took."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    erasing: Hash = Field(description="the hash over all that decides the erasure")
    erasure_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="which one it is")]
    run: Hash = Field(description="the run that has computed it, under the same method")
    computed: Line = Field(description="when")
    erase_s: float = Field(description="seconds that it took, over all attempts")
    peak_memory_mb: float = Field(description="the most memory that was held until it was done")


class Environment(BaseModel):
    """The content of env.json."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    python: Line
    system: Line
    machine: Line
    versions: dict[str, Line | None]


class LogLine(BaseModel):
    """A line of log.jsonl: when, which event, and the event's own fields."""

    model_config = ConfigDict(extra="allow")

    time: str = ""
    event: str
    step: int = 0
    total: int = 0
    values: dict[str, float] = Field(default_factory=dict)


def read_whole(model: type[Model], path: Path) -> Model | None:
    """The content of a file, None if it is missing or damaged."""
    try:
        return read_document(model, path)
    except (OSError, Damaged):
        return None


def read_text(path: Path) -> str:
    """A text file, "" if it is missing, too large or none."""
    try:
        plain_file(path, most=LARGEST)
        return path.read_text(encoding="utf-8")
    except (OSError, Damaged, UnicodeDecodeError):
        return ""


def read_log(path: Path, *, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The events in log.jsonl; lines that were cut when a run was killed, or are no events, are left out.

    Args:
        path: the file.
        only: names of the events that are wanted; all, if left out.
    """
    wanted = [f'"{name}"'.encode() for name in only]
    try:
        plain_file(path, most=LONGEST_LOG)
        lines = path.read_bytes().split(b"\n")
    except (OSError, Damaged):
        return
    for line in lines:
        if wanted and not any(name in line for name in wanted):
            continue
        try:
            yield LogLine.model_validate(json.loads(line)).model_dump(exclude_unset=True)
        except (ValueError, ValidationError, RecursionError):
            continue
