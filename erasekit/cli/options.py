"""Flags that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from erasekit.cli import completing
from erasekit.cli.ends import say
from erasekit.concepts import Kind as ConceptKind
from erasekit.errors import UsageError
from erasekit.registration.plugins import Registries, default, load
from erasekit.runs.config import parse_overrides

Plugin = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="A Python file that is a plugin; repeatable.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where runs are kept.")]
_METHODS, _BACKBONES, _TASKS, _ATTACKS = map(completing.names, ("methods", "backbones", "tasks", "attacks"))
Method = Annotated[
    str | None,
    typer.Option("--method", "-m", help="The erasure method.  [default: trace]", show_default=False, autocompletion=_METHODS),
]
Backbone = Annotated[
    str | None,
    typer.Option("--backbone", "-b", help="The model.  [default: sd15-mini]", show_default=False, autocompletion=_BACKBONES),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        "-t",
        help="What is measured.  [default: objects; free on real models]",
        show_default=False,
        autocompletion=_TASKS,
    ),
]
Concept = Annotated[
    list[str] | None,
    typer.Option("--concept", "-c", metavar="NAME", help="What to erase, e.g. cat or cat:kitty,kitten.", show_default=False),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--kind",
        help="What the concept is: object, identity, style, nsfw or free.",
        show_default=False,
        autocompletion=completing.one_of(*get_args(ConceptKind)),
    ),
]
Neutral = Annotated[
    str | None,
    typer.Option(
        "--neutral",
        metavar="WORDS",
        help="What takes the place of the concept's words; '' drops them, '<empty>' empties the whole prompt.",
        show_default=False,
    ),
]
Preserve = Annotated[
    list[str] | None,
    typer.Option(
        "--preserve", metavar="WORDS", help="A thing of its kind that must not change; repeatable.", show_default=False
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="The seed of everything random.  [default: 0]", show_default=False)]
Limit = Annotated[int | None, typer.Option("--limit", help="The most images per prompt set.", show_default=False)]
Attack = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        "-a",
        metavar="NAME",
        help="What tries to bring the concept back; repeatable.",
        show_default=False,
        autocompletion=_ATTACKS,
    ),
]
KeepTexts = Annotated[
    bool, typer.Option("--keep-texts", help="Keep the texts that attacks find, and not only their hashes.", show_default=False)
]
Preset = Annotated[str | None, typer.Option("--preset", help="A named set of the method's settings.", show_default=False)]
Files = Annotated[
    str | None,
    typer.Option(
        "--files",
        help="Type of the erasure's tensors: float32, float16, bfloat16.  [default: float32]",
        show_default=False,
        autocompletion=completing.one_of("float32", "float16", "bfloat16"),
    ),
]
Strength = Annotated[
    list[str] | None,
    typer.Option(
        "--strength",
        metavar="NUMBER",
        help="How strongly the erasure acts, 0 to 1 and beyond; cat=0.5 for one concept; repeatable.  [default: 1]",
        show_default=False,
    ),
]
SampleEvery = Annotated[
    int | None,
    typer.Option(
        "--sample-every",
        metavar="STEPS",
        help="Training steps between images in samples/; 0 draws none.  [default: five times, on small models]",
        show_default=False,
    ),
]
Tracker = Annotated[
    str | None,
    typer.Option(
        "--tracker",
        metavar="NAME",
        help="Who follows the run: tensorboard, wandb, ...",
        show_default=False,
        autocompletion=completing.one_of("tensorboard", "wandb"),
    ),
]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A TOML file of settings.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="A setting, e.g. method.steps=50.", show_default=False),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="GB",
        help="GPU memory to get along with: auto, 8, 12, 16, 24, 32, 48, 80, 141.",
        show_default=False,
        autocompletion=completing.one_of("auto", "8", "12", "16", "24", "32", "48", "80", "141"),
    ),
]


Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help="A CSV file of the prompts of what is erased, in I2P's columns.", show_default=False
    ),
]


def overrides(settings: list[str] | None, vram: str | None, prompts: Path | None = None) -> list[str]:
    """The settings that `-s` gives, and those that `--vram` and `--prompts` stand for."""
    more = [f"backbone.vram={vram}"] if vram else []
    more += [f"task.sets.erase.csv={json.dumps(str(prompts))}"] if prompts else []
    return [*(settings or ()), *more]


def chosen(settings: list[str] | None, vram: str | None) -> dict[str, Any]:
    """The settings of a command that has those of the backbone and of the protocol only.

    Raises:
        UsageError: others are given.
    """
    found = parse_overrides(overrides(settings, vram))
    if unknown_parts := sorted(set(found) - {"backbone", "protocol"}):
        raise UsageError(f"'{unknown_parts[0]}' has no settings here. Write backbone.key=value or protocol.key=value.")
    return found


def registries(files: list[Path] | None) -> Registries:
    """What is registered, the given plugin files included; broken plugins are named on stderr."""
    found = load(files) if files else default()
    for plugin in found.broken():
        say(f"Plugin '{plugin.name}' is broken: {plugin.error}. See 'erasekit plugins {plugin.name}'.", "red")
    return found
