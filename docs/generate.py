"""Writes docs/tables.md from the code: run `python docs/generate.py` after changing a setting, a name or a docstring."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import erasekit
from erasekit import events
from erasekit.cli import build
from erasekit.evaluation.judgement import Judgement
from erasekit.evaluation.metrics import MEASURES
from erasekit.evaluation.results import Metric, RunResult
from erasekit.evaluation.taskfile import ConceptSpec, SetSpec, TaskFile
from erasekit.evaluation.tasks import PROMPT_SETS, Protocol
from erasekit.registration import hookspecs
from erasekit.registration.plugins import Registries, default
from erasekit.registration.registry import Entry, Names
from erasekit.runs.config import RunConfig
from erasekit.sweeps.suite import Suite

PAGE = Path(__file__).with_name("tables.md")
HEAD = """# Every name, setting and metric

`python docs/generate.py` writes this page from the code, and a test compares it: edit the docstring or the field, not the page.
The [reference](reference.md) explains how things work together.
"""


def page() -> str:
    """The whole page."""
    registries = default()
    sections = [
        commands,
        names,
        methods,
        backbones,
        evaluators,
        attacks,
        components,
        configuration,
        metrics,
        hooks,
        heard,
        files,
        public,
    ]
    parts = [HEAD, *(part for section in sections for part in section(registries))]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(str(cell).split()).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def first(thing: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def shown(value: Any) -> str:
    """A value as TOML would have it, in code."""
    if value is PydanticUndefined:
        return "needed"
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return ", ".join(f"`{key}={shown(v).strip('`')}`" for key, v in value.model_dump().items())
    if isinstance(value, tuple | list | frozenset):
        return f"`[{', '.join(shown(v).strip('`') for v in value)}]`"
    if isinstance(value, Mapping):
        return f"`{{{', '.join(f'{key} = {shown(v).strip(chr(96))}' for key, v in value.items())}}}`"
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value).replace(chr(39), chr(34))}`"


def fields(model: type[BaseModel], key: str, layers: Mapping[str, Mapping[str, Any]] = {}) -> str:
    """The settings of a model: default, what a backbone or a preset has in its place, what it means."""
    rows = []
    for name, field in model.model_fields.items():
        value = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
        others = [f"{layer}: {shown(values[name])}" for layer, values in layers.items() if values.get(name, value) != value]
        rows.append([f"`{name}`", shown(value), *([", ".join(others)] if layers else []), field.description or ""])
    return table([key, "default", *(["elsewhere"] if layers else []), "meaning"], rows)


def own(names: Names) -> Iterator[Entry]:
    """What comes with erasekit; other packages that are installed have pages of their own."""
    return (entry for entry in names.entries() if entry.source.split()[0] == "erasekit")


def configured(title: str, key: str, entries: Iterable[Entry]) -> Iterator[str]:
    """A section with the settings of each thing."""
    yield f"## {title}\n"
    for entry in entries:
        kind = entry.load()
        yield f"### `{entry.name}`\n\n{first(kind)} Settings: `{key.format(entry.name)}`."
        yield said_of(kind.Config)
        if kind.Config.model_fields:
            layers = dict(getattr(kind, "defaults", {})) | {f"preset {k}": v for k, v in getattr(kind, "presets", {}).items()}
            yield fields(kind.Config, "setting", layers)


def said_of(config: Any) -> str:
    """What the docstring of settings says besides whose they are, e.g. where their values are published."""
    text = " ".join((inspect.getdoc(config) or "").split()) if config.__doc__ else ""
    return re.sub(r"^Settings( of [^.:;]*)?\. ?", "", text)


def commands(registries: Registries) -> Iterator[str]:
    """The command line."""
    yield "## Commands\n"
    found = typer.main.get_command(build()).commands  # type: ignore[attr-defined]
    for name, command in found.items():
        yield f"### `erasekit {name}`\n\n{' '.join(command.help.split())}"
        rows = []
        for parameter in command.params:
            flags = [*parameter.opts, *parameter.secondary_opts]
            if "--help" in flags:
                continue
            spelt = ", ".join(f"`{flag}`" if flag.startswith("-") else f"`{flag.upper()}`" for flag in flags)
            rows.append([spelt, " ".join((parameter.help or "").split())])
        yield table(["flag or argument", "meaning"], rows) if rows else ""


def names(registries: Registries) -> Iterator[str]:
    """Everything that is registered."""
    yield "## Names\n"
    for kind in registries.all():
        rows = [[f"`{e.name}`", ", ".join(f"`{a}`" for a in e.aliases), e.summary, e.paper] for e in own(kind)]
        yield f"### {kind.plural.capitalize()}\n\n{table(['name', 'also', 'what it is', 'paper'], rows)}"


def methods(registries: Registries) -> Iterator[str]:
    """Settings of methods."""
    yield from configured("Settings of methods", "-s method.KEY=VALUE", own(registries.methods))


def backbones(registries: Registries) -> Iterator[str]:
    """Settings of backbones."""
    yield from configured("Settings of backbones", "-s backbone.KEY=VALUE", own(registries.backbones))


def evaluators(registries: Registries) -> Iterator[str]:
    """Settings of evaluators."""
    yield from configured("Settings of evaluators", "-s evaluators.{}.KEY=VALUE", own(registries.evaluators))


def attacks(registries: Registries) -> Iterator[str]:
    """Settings of attacks."""
    yield from configured("Settings of attacks", "-s attacks.{}.KEY=VALUE", own(registries.attacks))


def components(registries: Registries) -> Iterator[str]:
    """Which method has which slots."""
    slots = [(e.name, slot) for e in own(registries.methods) for slot in e.load().slots]
    yield "## Slots of methods\n"
    rows = [[f"`{m}`", f"`method.{s}`", ", ".join(f"`{c}`" for c in registries.components.choices(s))] for m, s in slots]
    yield table(["method", "slot", "choices"], rows)
    with_settings = [
        dataclasses.replace(e, name=e.name.partition("/")[2]) for e in own(registries.components) if hasattr(e.load(), "Config")
    ]
    yield from configured("Settings of components", "-s components.{}.KEY=VALUE", with_settings)


def configuration(registries: Registries) -> Iterator[str]:
    """Runs, suites, protocols and tasks in TOML."""
    titles = {
        RunConfig: "A run: keys of `--config`, arguments of `RunConfig`",
        Protocol: "A protocol: `-s protocol.KEY=VALUE`",
        Suite: "A suite of `erasekit sweep`",
        TaskFile: "A task in TOML",
        SetSpec: "A prompt set of a task in TOML",
        ConceptSpec: "A concept of a task in TOML",
    }
    yield "## Configuration\n"
    for model, title in titles.items():
        yield f"### {title}\n\n{fields(model, 'key')}"


def metrics(registries: Registries) -> Iterator[str]:
    """Metrics of tasks and of evaluators, and prompt sets."""
    yield "## Metrics and prompt sets\n"
    rows = [[f"`{name}`", m.meaning, ", ".join(f"`{s}`" for s in m.needs)] for name, m in MEASURES.items()]
    given = [(n, m, e.name) for e in own(registries.evaluators) for n, m in e.load().meanings.items()]
    seen: dict[tuple[str, str], list[str]] = {}
    for name, meaning, by in given:
        seen.setdefault((name, meaning), []).append(f"`{by}`")
    rows += [[f"`{name}`", meaning, f"given by {', '.join(by)}"] for (name, meaning), by in seen.items()]
    yield table(["metric", "meaning", "rests on the sets"], rows)
    sets = [[f"`{name}`", s.meaning, "yes" if s.needed else "", "yes" if s.drawn else ""] for name, s in PROMPT_SETS.items()]
    yield table(["prompt set", "its prompts ask for", "needed", "drawn"], sets)


def hooks(registries: Registries) -> Iterator[str]:
    """The hooks of plugins."""
    found = {n: f for n, f in vars(hookspecs).items() if inspect.isfunction(f) and f.__module__ == hookspecs.__name__}
    yield "## Hooks\n"
    yield table(
        ["hook", "meaning"], [[f"`{n}({', '.join(inspect.signature(f).parameters)})`", first(f)] for n, f in found.items()]
    )


def heard(registries: Registries) -> Iterator[str]:
    """The events of a run."""
    kinds = [c for c in vars(events).values() if inspect.isclass(c) and issubclass(c, events.Event) and c is not events.Event]
    yield "## Events\n\nEach is a line of `log.jsonl`, too: its name as `event`, and its fields."
    yield table(
        ["event", "fields", "meaning"],
        [[f"`{c.__name__}`", ", ".join(f"`{f.name}`" for f in dataclasses.fields(c)), first(c)] for c in kinds],
    )


def files(registries: Registries) -> Iterator[str]:
    """What other programs read."""
    titles = {
        RunResult: "`results.json`",
        Metric: "A metric in `results.json`",
        Judgement: "What a judge says of an image, in `scores.parquet`",
    }
    yield "## Files\n"
    for model, title in titles.items():
        said = attributes(model)
        rows = [[f"`{name}`", f"`{kind_of(field.annotation)}`", said[name]] for name, field in model.model_fields.items()]
        yield f"### {title}\n\n{table(['key', 'type', 'meaning'], rows)}"


def kind_of(annotation: Any) -> str:
    """A type, without the modules that it is from."""
    plain = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    return re.sub(r"\b(\w+\.)+", "", plain)


def attributes(thing: Any) -> dict[str, str]:
    """What a docstring says under `Attributes:`."""
    said: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(thing) or "").partition("Attributes:\n")[2].splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, line = line.strip().partition(": ")
        said[name] = f"{said.get(name, '')} {line.strip()}".strip()
    return said


def public(registries: Registries) -> Iterator[str]:
    """What `erasekit` exports."""
    yield "## Python\n"
    rows = [[f"`erasekit.{name}`", first(getattr(erasekit, name))] for name in erasekit.__all__ if not name.startswith("__")]
    yield table(["name", "what it is"], rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
