"""A suite: a grid of methods, backbones, tasks, concepts and seeds, as a TOML file says it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from erasekit.errors import UsageError
from erasekit.registration.plugins import Registries
from erasekit.runs.config import build, parse_overrides, settings_of
from erasekit.settings import merge, read_toml


class Row(BaseModel):
    """A row of the table: a method with settings of its own.

    Besides the fields below it takes every key of a run's config file.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field("", description="what the table calls it; the method's name, if left out")
    method: str = Field(description="the erasure method")

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a run of this row has otherwise than other rows."""
        return {"method": self.method, **(self.model_extra or {})}

    @property
    def title(self) -> str:
        """What the table calls it."""
        return self.name or self.method


class Suite(BaseModel):
    """A grid of runs. A cell of it is one run: a row, a backbone, a task, one or several concepts together, a seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field("", description="stands over the table")
    methods: tuple[str, ...] = Field((), description="a row for each, with its defaults")
    ablations: tuple[str, ...] = Field((), description="methods of which each declared ablation is a row too")
    rows: tuple[Row, ...] = Field((), description="rows with settings of their own: a name, a method, keys of a config file")
    backbones: tuple[str, ...] = Field(("sd15-mini",), description="the models to erase from")
    tasks: tuple[str, ...] = Field(("",), description="what is measured; left out, the domain's own")
    concepts: dict[str, tuple[str | tuple[str, ...], ...]] = Field(
        default_factory=dict,
        description="what is erased, by task: names, each a cell, and lists of names that are erased together; the task's own, "
        "one by one, for a task that is not named",
    )
    seeds: tuple[int, ...] = Field((0,), description="each a cell; of a method that has no use for a seed, the first only")
    run: dict[str, Any] = Field(default_factory=dict, description="keys of a config file, for every cell")
    on: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="the same for the cells of one backbone, task or method; over `run`, under a row's own",
    )


def read_suite(path: Path) -> Suite:
    """Read a suite.

    Raises:
        UsageError: there is none; it is not TOML; lists every unknown or wrong key.
    """
    suite: Suite = settings_of(Suite, read_toml(path, "suite", "Give the path of a TOML file."), "")
    return suite


def of_method(method: str, registries: Registries, *, rows: Sequence[str] = (), **axes: Any) -> Suite:
    """The suite of `erasekit ablate`: a method, its declared ablations, and rows of the user's own.

    Args:
        method: the method.
        registries: what names stand for.
        rows: `name: method.key=value ...` each.
        axes: the other fields of a `Suite`.

    Raises:
        UsageError: a row cannot be read, or there is nothing to compare.
    """
    name = registries.methods.entry(method).name
    suite: Suite = settings_of(
        Suite, {"methods": (name,), "ablations": (name,), "rows": [parse_row(text, name) for text in rows], **axes}, ""
    )
    if len(rows_of(suite, registries)) < 2:
        raise UsageError(f"'{name}' declares no ablations. Say what to compare it with: --row 'name: method.key=value'.")
    return suite


def adjusted(suite: Suite, *, limit: int | None = None, options: Mapping[str, Any] | None = None) -> Suite:
    """The suite with settings that go over its own; a row's own, which make it what it is, stay.

    Args:
        suite: as it was read.
        limit: the most images per prompt set.
        options: settings of the method, the backbone, the protocol, evaluators; under `on`, by name, those for the cells
            of one backbone, task or method only.

    Raises:
        UsageError: what stands under `on` is no setting of something.
    """
    everywhere = dict(options or {})
    some = everywhere.pop("on", {})
    if not isinstance(some, dict) or not all(isinstance(each, dict) for each in some.values()):
        raise UsageError("Settings for some cells have the form on.NAME.KEY=VALUE, e.g. on.uce.method.ridge=0.1.")
    given: dict[str, Any] = {"options": everywhere} if everywhere else {}
    given |= {"limit": limit} if limit else {}
    layers = {
        name: merge(merge(suite.on.get(name, {}), given), {"options": some[name]} if name in some else {})
        for name in dict.fromkeys((*suite.on, *some))
    }
    return suite.model_copy(update={"run": merge(suite.run, given), "on": layers})


def parse_row(text: str, method: str) -> dict[str, Any]:
    """A row from `name: method.key=value backbone.key=value`.

    Raises:
        UsageError: it has no name or no setting.
    """
    name, colon, settings = text.partition(":")
    try:
        words = shlex.split(settings)
    except ValueError as error:
        raise UsageError(f"Cannot read the row '{text}': {error}. Write it as 'name: method.key=value'.") from None
    if not colon or not name.strip() or not words:
        raise UsageError(f"Cannot read the row '{text}'. Write it as 'name: method.key=value'.")
    return {"name": name.strip(), "method": method, "options": parse_overrides(words)}


def rows_of(suite: Suite, registries: Registries) -> list[Row]:
    """All rows: methods, each followed by its ablations if they are asked for, then the suite's own rows.

    Raises:
        UsageError: there is none, two have one name, or a method is unknown.
    """
    rows = []
    for method in dict.fromkeys((*suite.methods, *suite.ablations)):
        rows += [Row(method=method)] if method in suite.methods else []
        declared = registries.methods.get(method).ablations if method in suite.ablations else {}
        rows += [_ablation(method, name, settings) for name, settings in declared.items()]
    rows += suite.rows
    titles = [row.title for row in rows]
    if not rows:
        raise UsageError("The suite has no rows. Name methods: methods = ['trace', 'uce'].")
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise UsageError(f"Two rows are called '{twice[0]}'. Give each a name of its own.")
    return rows


def _ablation(method: str, name: str, settings: Mapping[str, Any]) -> Row:
    """A row of a method that leaves out, or changes, one part of it."""
    return Row.model_validate({"name": f"{method} {name}", "method": method, "options": {"method": dict(settings)}})


def grid(suite: Suite, registries: Registries) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every cell as (title of its row, keys of a config file), those of one backbone, task and concept together.

    Without `concepts` in the keys, each of the task's concepts is a cell.
    """
    rows = rows_of(suite, registries)
    for backbone in suite.backbones:
        for task in suite.tasks:
            for concepts in suite.concepts.get(task, ((),)):
                together = (concepts,) if isinstance(concepts, str) else concepts
                for row in rows:
                    for seed in suite.seeds:
                        axes = {"backbone": backbone, "task": task, "concepts": together, "seed": seed}
                        yield row.title, _layered(suite, row, axes)


def _layered(suite: Suite, row: Row, axes: Mapping[str, Any]) -> dict[str, Any]:
    """The suite's settings, those on the cell's backbone, task and method, the row's own, then the cell's place."""
    values: dict[str, Any] = {}
    for layer in (suite.run, *(suite.on.get(name, {}) for name in (axes["backbone"], axes["task"], row.method)), row.settings):
        values = merge(values, layer)
    return values | {key: value for key, value in axes.items() if value not in ("", ())}


def config_of(values: Mapping[str, Any]) -> Any:
    """The configuration of a cell.

    Raises:
        UsageError: lists every mistake.
    """
    return build(dict(values))
