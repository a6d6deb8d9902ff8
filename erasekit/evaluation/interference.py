"""Which erasure takes what else with it: of each thing that images were asked for the share that still show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from erasekit.evaluation.curves import Interference
from erasekit.evaluation.evaluators import Side
from erasekit.evaluation.metrics import Images

SETS = ("erase", "preserve")  # that ask for a thing by its name
Rows = Sequence[Mapping[str, Any]]


def interference_of(runs: Mapping[str, Rows]) -> Interference:
    """What the erasures of several runs did to one another's concepts, and to what else their tasks hold.

    Args:
        runs: {what was erased: the scored rows of both sides of the run}.

    A column is a concept that one of the runs erased, or a thing that has to stay. The base's row is of all runs' images
    together, each counted once.
    """
    names = _names(runs.values())
    erased = {name: _flags(rows, "erased", names) for name, rows in runs.items()}
    together = [_flags(rows, "base", names) for rows in runs.values()]
    seen = dict.fromkeys(thing for found in (*erased.values(), *together) for thing in found)
    asked = sorted(seen, key=lambda thing: (thing not in runs, list(runs).index(thing) if thing in runs else 0))
    base = {thing: {key: flag for found in together for key, flag in found.get(thing, {}).items()} for thing in asked}
    return Interference(
        erased=tuple(runs),
        asked=tuple(asked),
        values=tuple(tuple(_mean(found.get(thing, {})) for thing in asked) for found in erased.values()),
        base=tuple(_mean(base[thing]) for thing in asked),
        images=tuple(tuple(len(found.get(thing, {})) for thing in asked) for found in erased.values()),
    )


def _flags(rows: Rows, side: Side, names: Mapping[str, str]) -> dict[str, dict[tuple[str, int], float]]:
    """{thing: {(prompt, seed) of an image: whether it shows the thing}}, of a side's images that a judge has an answer to."""
    images = Images({side: [r for r in rows if r["side"] == side and not r["failed"]]}, ())
    found: dict[str, dict[tuple[str, int], float]] = {}
    for which in SETS:
        for row, judgement in images.of(side, which):
            if judgement.shown is not None:
                thing = row["concept"] or names.get(row["label"], row["label"])
                found.setdefault(thing, {})[row["prompt"], row["seed"]] = float(judgement.shown)
    return found


def _names(runs: Any) -> dict[str, str]:
    """{label: the concept that one of the runs erases under it}."""
    return {row["label"]: row["concept"] for rows in runs for row in rows if row["set"] == "erase" and row["concept"]}


def _mean(flags: Mapping[Any, float]) -> float | None:
    return sum(flags.values()) / len(flags) if flags else None
