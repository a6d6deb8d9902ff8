"""Erasures of different runs as one, and what they do to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from erasekit.backbones.protocol import Backbone
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.remains import Remains
from erasekit.errors import UsageError
from erasekit.methods.validation import remains_of
from erasekit.registration.plugins import Registries, default
from erasekit.runs.compute import context
from erasekit.runs.config import RunConfig, build, settings_of
from erasekit.runs.plan import Plan
from erasekit.runs.resolve import resolve

METHOD = "merged"  # what the record of several erasures says as its method; its settings say which those are


class Together(NamedTuple):
    """Erasures as one.

    Attributes:
        erasure: all of them; it is measured if they were.
        alone: what each leaves of its concepts and moves of the rest, by predictions; empty if that was not measured.
    """

    erasure: Erasure
    alone: tuple[Remains, ...]


def merge(
    folders: Sequence[Path],
    *,
    task: str = "",
    measure: bool = True,
    backbone: Mapping[str, Any] | None = None,
    registries: Registries | None = None,
) -> Together:
    """Put erasures of one base together: their deltas add up, and every concept keeps a file of its own.

    Args:
        folders: the erasures, two or more.
        task: where validation prompts come from; the domain's usual one, if left out.
        measure: by predictions on validation prompts, what each erasure leaves alone and what all leave together.
        backbone: settings of the backbone.
        registries: what names stand for; what is installed, if left out.

    Raises:
        UsageError: they are of different bases, share a concept, or change no weights.
        EnvironmentProblem: a file is damaged, or the base cannot be loaded.
    """
    registries = registries or default()
    erasures = [Erasure.load(folder) for folder in folders]
    _check(folders, erasures)
    kind = registries.backbones.get(erasures[0].backbone)
    base = kind.load(settings_of(kind.Config, backbone or {}, "backbone."))
    erasures = [Erasure.load(folder, base) for folder in folders]
    erasure = Erasure.of(
        base,
        [concept for e in erasures for concept in e.concepts],
        method=METHOD,
        config={"of": [_origin(e) for e in erasures]},
        deltas={name: parts for e in erasures for name, parts in e.deltas.items()},
    )
    warnings = tuple(dict.fromkeys(line for e in erasures for line in e.warnings))
    erasure = replace(erasure, warnings=warnings)
    if not measure:
        return Together(erasure, ())
    plan = plan_of(erasure, task, backbone or {}, registries)
    alone = tuple(_remains(plan, base, e, registries) for e in erasures)
    both = _remains(plan, base, erasure, registries)
    figures = {"alone": [remains.model_dump() for remains in alone]}
    return Together(replace(erasure, remains=both, warnings=(*warnings, *both.warnings()), figures=figures), alone)


def plan_of(erasure: Erasure, task: str, backbone: Mapping[str, Any], registries: Registries, limit: int | None = None) -> Plan:
    """The plan of measuring an erasure, on its own concepts."""
    names = tuple(concept.name for concept in erasure.concepts)
    flags = {"method": METHOD, "backbone": erasure.backbone, "task": task, "concepts": names, "limit": limit}
    config: RunConfig = build(flags | {"options": {"backbone": dict(backbone)}})
    given = {"method": METHOD, "config": {}}
    return replace(resolve(config, registries, given=given), concepts=erasure.concepts)


def _remains(plan: Plan, base: Backbone, erasure: Erasure, registries: Registries) -> Remains:
    """What an erasure leaves of its own concepts, and its drift."""
    return remains_of(context(replace(plan, concepts=erasure.concepts), base, registries), erasure)


def _origin(erasure: Erasure) -> dict[str, Any]:
    """Which erasure it was, as the record of all says it."""
    return {"method": erasure.method, "config": dict(erasure.config), "concepts": [c.name for c in erasure.concepts]}


def _check(folders: Sequence[Path], erasures: Sequence[Erasure]) -> None:
    """See that erasures can be put together.

    Raises:
        UsageError: they cannot.
    """
    if len(folders) < 2:
        raise UsageError("One erasure is not put together with anything. Give two folders or more.")
    for folder, erasure in zip(folders, erasures, strict=True):
        if erasure.kind == "guidance":
            raise UsageError(f"'{folder}' changes no weights: there is nothing to add up. Load it beside the others.")
        if erasure.backbone != erasures[0].backbone:
            models = f"'{folders[0]}' was made for '{erasures[0].backbone}' and '{folder}' for '{erasure.backbone}'"
            raise UsageError(f"{models}. Give erasures of one base.")
    names = [name for erasure in erasures for name in {*erasure.deltas, *(c.name for c in erasure.concepts)}]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"'{twice[0]}' is erased by two of them, which would erase it twice. Leave one out.")
