"""The cells of a suite: which run each is, where it lies, and how far it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, RootModel

from erasekit.documents import read_document
from erasekit.errors import ErasekitError, UsageError
from erasekit.evaluation.finding import find_task
from erasekit.registration.plugins import Registries
from erasekit.runs.config import RunConfig
from erasekit.runs.records import LogLine
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import mark, path_of, read_status, write_json
from erasekit.sweeps.suite import Suite, config_of, grid

State = Literal["waiting", "begun", "failed", "finished"]
CELLS = "cells.json"


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a suite.

    Attributes:
        row: its row of the table.
        config: its keys of a config file.
        path: its run directory, under the folder of all runs; "" if it cannot be run.
        refused: why it cannot be run.
    """

    row: str
    config: dict[str, Any]
    path: str = ""
    refused: str = ""

    def place(self) -> str:
        """What it erases from what, in words."""
        config = self.config
        words = [config["backbone"], config.get("task", ""), "+".join(config.get("concepts", ())), f"seed {config['seed']}"]
        return " ".join(filter(None, words))


class _Record(BaseModel):
    """A cell as it is written down."""

    model_config = ConfigDict(extra="forbid")

    row: str
    config: dict[str, Any]
    path: str = ""
    refused: str = ""


class _Cells(RootModel[list[_Record]]):
    """The content of cells.json."""


class Seen(NamedTuple):
    """How far a cell is.

    Attributes:
        state: `waiting`, `begun` (somebody works on it, or did), `failed` or `finished`.
        stage: the last stage that was begun, and how far it is.
        seconds: that its finished stages took.
        error: why it failed.
    """

    state: State
    stage: str = ""
    seconds: float = 0.0
    error: str = ""


def cells_of(suite: Suite, registries: Registries, out: Path) -> list[Cell]:
    """All cells of a suite in its order; what cannot be run is refused by itself, and stops no other.

    Raises:
        UsageError: a name is unknown, or no cell can be run.
    """
    _check_names(suite, registries)
    cells: list[Cell] = []
    known: set[tuple[str, str]] = set()
    for row, values in grid(suite, registries):
        new = [c for c in _cells(row, values, suite.seeds[0], registries, out) if c.refused or (row, c.path) not in known]
        known |= {(row, cell.path) for cell in new}
        cells += new
    if all(cell.refused for cell in cells):
        raise UsageError("\n".join(dict.fromkeys(cell.refused for cell in cells)))
    drawn = list(dict.fromkeys(map(_images, cells)))
    return sorted(cells, key=lambda cell: drawn.index(_images(cell)))


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells that `--only` leaves: of patterns for one axis any may fit, and of every axis one has to.

    Args:
        cells: of a suite.
        patterns: `method=stereo`, `seed=0`, `concept=cat+*`: an axis and what the shell would call a pattern.

    Raises:
        UsageError: a pattern has another form, or fits no cell.
    """
    wanted: dict[str, list[str]] = {}
    for text in patterns:
        axis, equals, pattern = text.partition("=")
        if not equals or axis not in AXES:
            raise UsageError(f"Cannot read --only '{text}'. Write AXIS=PATTERN with one of: {', '.join(AXES)}.")
        if not any(fnmatchcase(AXES[axis](cell), pattern) for cell in cells):
            known = ", ".join(dict.fromkeys(AXES[axis](cell) for cell in cells))
            raise UsageError(f"No cell has {axis} '{pattern}'. There are: {known}.")
        wanted.setdefault(axis, []).append(pattern)
    found = [c for c in cells if all(any(fnmatchcase(AXES[a](c), p) for p in of) for a, of in wanted.items())]
    if not found:
        raise UsageError(f"No cell fits all of: {', '.join(patterns)}.")
    return found


AXES: dict[str, Callable[[Cell], str]] = {
    "row": lambda cell: cell.row,
    "method": lambda cell: str(cell.config["method"]),
    "backbone": lambda cell: str(cell.config["backbone"]),
    "task": lambda cell: str(cell.config.get("task", "")),
    "concept": lambda cell: "+".join(cell.config.get("concepts", ())),
    "seed": lambda cell: str(cell.config["seed"]),
}


def _images(cell: Cell) -> tuple[Any, ...]:
    """What decides a cell's images of the unedited model: cells that share them follow one another."""
    return cell.config["backbone"], cell.config.get("task", ""), tuple(cell.config.get("concepts", ()))


def _cells(row: str, values: dict[str, Any], first: int, registries: Registries, out: Path) -> list[Cell]:
    """The cell of some keys; one for each of the task's concepts, if the keys name none.

    Where the seed changes nothing, it is the first one: of the others come the same cells.
    """
    try:
        plan = resolve(config_of(values), registries)
    except ErasekitError as error:
        return [Cell(row, values, refused=str(error))]
    if not plan.seeded:
        plan = replace(plan, config=plan.config.model_copy(update={"seed": first}))
    plans = plan.singles() if plan.separate else [plan]
    return [Cell(row, p.config.model_dump(mode="json", exclude_defaults=True) | _named(p), _path(out, p)) for p in plans]


def _named(plan: Any) -> dict[str, Any]:
    """What a cell always says, also where it is the default."""
    named: dict[str, Any] = plan.config.model_dump(mode="json", include={"method", "backbone", "task", "seed"})
    return named | {"concepts": plan.config.concepts or tuple(c.name for c in plan.concepts)}


def _path(out: Path, plan: Any) -> str:
    return path_of(out, plan).relative_to(out).as_posix()


def _check_names(suite: Suite, registries: Registries) -> None:
    """See that every name is one, before anything is begun: a slip in one would cost all its cells."""
    lines: list[str] = []
    for names, registry in (([*suite.methods, *suite.ablations, *(r.method for r in suite.rows)], registries.methods),):
        lines += _unknown(registry.entry, names)
    lines += _unknown(registries.backbones.entry, suite.backbones)
    if not lines:
        domains = {registries.backbones.get(name).domain for name in suite.backbones}
        for task in filter(None, suite.tasks):
            faults = [_unknown(partial(find_task, domain=domain, registries=registries), [task]) for domain in sorted(domains)]
            lines += [] if [] in faults else faults[0]
    known = {*suite.backbones, *suite.tasks, *suite.methods, *suite.ablations, *(r.method for r in suite.rows)}
    lines += [f"'on.{name}' is no backbone, task or method of this suite." for name in suite.on if name not in known]
    lines += [f"'concepts.{name}' is no task of this suite." for name in suite.concepts if name not in suite.tasks]
    if lines:
        raise UsageError("\n".join(dict.fromkeys(lines)))


def _unknown(look_up: Any, names: Sequence[str]) -> list[str]:
    lines = []
    for name in names:
        try:
            look_up(name)
        except UsageError as error:
            lines.append(str(error))
    return lines


def write_cells(cells: Sequence[Cell], out: Path, name: str) -> Path:
    """Write down what is to be done, for every worker to read; the sweep's folder, named by all its cells."""
    digest = hashlib.sha256(json.dumps([(c.row, c.path, c.refused) for c in cells]).encode()).hexdigest()[:8]
    folder = out / "sweeps" / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CELLS, [asdict(cell) for cell in cells])
    return folder


def read_cells(folder: Path) -> list[Cell]:
    """What `write_cells` wrote.

    Raises:
        EnvironmentProblem: it is damaged.
    """
    return [Cell(**record.model_dump()) for record in read_document(_Cells, folder / CELLS, advice="Run the sweep again.").root]


def run_config(cell: Cell) -> RunConfig:
    """What to hand to `erasekit.run`."""
    return RunConfig.model_validate(cell.config)


def seen(cell: Cell, out: Path) -> Seen:
    """How far a cell is, read from its run directory."""
    if cell.refused:
        return Seen("failed", error=cell.refused)
    status = read_status(out / cell.path)
    if not status:
        return Seen("waiting")
    seconds = sum(status.get("timings_s", {}).values())
    if status["state"] == "finished" and (out / cell.path / "results.json").is_file():
        return Seen("finished", seconds=seconds)
    if status["state"] == "failed":
        return Seen("failed", seconds=seconds, error=status.get("error", ""))
    return Seen("begun", _stage(out / cell.path / "log.jsonl"), seconds)


def _stage(log: Path) -> str:
    """What the last line of a log tells of, and how far that is."""
    last = _last(log)
    texts = {
        "StageStarted": "{stage}",
        "StepEnd": "steps {step}/{total}",
        "Sampled": "{which} images {done}/{total}",
        "Progressed": "{what} {done}/{total}",
    }
    try:
        return texts.get(last.get("event", ""), "").format_map(last)
    except KeyError:
        return ""


def _last(log: Path, size: int = 4096) -> dict[str, Any]:
    """The last whole line of a log; {} if there is none, or none so short."""
    if not log.is_file():
        return {}
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - size))
        lines = file.read().split(b"\n")
    try:
        found: dict[str, Any] = LogLine.model_validate_json(lines[-2]).model_dump() if len(lines) > 2 else {}
    except ValueError:  # a worker was killed in the midst of the line
        return {}
    return found


def give_another_chance(cells: Sequence[Cell], out: Path) -> None:
    """Take back that cells have failed, so that they are run again from what they had finished."""
    for cell in cells:
        if not cell.refused and seen(cell, out).state == "failed":
            mark(out / cell.path, "running")
