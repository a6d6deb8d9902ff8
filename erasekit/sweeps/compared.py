"""Finished runs in one table, if they were measured alike, and published numbers beside them where those were too."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erasekit.errors import UsageError
from erasekit.evaluation.results import ATTACKS_HASH, RunResult, read_result
from erasekit.evaluation.summary import by_protocol
from erasekit.runs.pages.comparison import row_names
from erasekit.sweeps.table import Runs, rows_of

PUBLISHED = Path(__file__).with_name("published.toml")


def compared_rows(folders: Sequence[Path]) -> dict[str, Any]:
    """A table's rows of runs: one for each method, over its concepts and seeds, with paired differences from the first row.

    Raises:
        UsageError: a folder holds no results, or the runs were not measured alike; says what differs.
    """
    results = [read_result(folder / "results.json") for folder in folders]
    rows: dict[str, dict[str, list[tuple[RunResult, Path]]]] = {}
    for name, result, folder in zip(row_names(results), results, folders, strict=True):
        rows.setdefault(name, {}).setdefault("+".join(result.concepts), []).append((result, folder))
    for key in ("backbone", "task"):
        if len(found := dict.fromkeys(getattr(r, key) for r in results)) > 1:
            raise UsageError(f"Runs of unlike protocols share no table: {key} is {' and '.join(found)}. Compare those of one.")
    if len(by_protocol(rows)) > 1:
        raise UsageError(f"Runs of unlike protocols share no table: {_unlike(rows)}. Compare those that were measured alike.")
    concepts = {name: sorted(of) for name, of in rows.items()}
    first = next(iter(concepts))
    for name in concepts:
        if concepts[name] != concepts[first]:
            told = " and ".join(f"'{n}' has {', '.join(concepts[n])}" for n in (first, name))
            raise UsageError(f"Rows need the same concepts: {told}. Give runs of the same ones.")
    return rows_of(rows)


def _unlike(rows: Runs) -> str:
    """What differs between the first two protocols that do."""
    first: dict[str, tuple[str, Mapping[str, Any]]] = {}
    every = [(name, concept, run.protocol) for name, of in rows.items() for concept, runs in of.items() for run, _ in runs]
    for name, concept, protocol in every:
        before, other = first.setdefault(concept, (name, protocol))
        if protocol["hash"] != other["hash"]:
            one, two = _flat(other), _flat(protocol)
            keys = [k for k in {**one, **two} if one.get(k) != two.get(k)]
            each = [f"{k} is {one.get(k, 'not set')} in '{before}' and {two.get(k, 'not set')} in '{name}'" for k in keys]
            return "; ".join(each) or f"'{before}' and '{name}' drew other prompts or seeds, or other versions of the task"
    return ""


def _flat(protocol: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a protocol, without its hashes."""
    found: dict[str, Any] = {}
    for key, value in protocol.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif prefix or key not in ("hash", ATTACKS_HASH):
            found[f"{prefix}{key}"] = value
    return found


def published(folder: Path) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Published rows that were measured as a run was.

    Args:
        folder: of the run.

    Returns:
        {name with its source: {metric: value}}, and for each table of the run's task that does not match, what differs.
    """
    result = read_result(folder / "results.json")
    rows: dict[str, dict[str, float]] = {}
    reasons: dict[str, None] = {}
    for table in tables():
        if table["task"] != result.task:
            continue
        if unmet := _unmet(table, result):
            metrics = dict.fromkeys(metric.partition("[")[0] for metric in table["metrics"])
            reasons[f"{table['source']} ({', '.join(metrics)}): {'; '.join(unmet)}"] = None
            continue
        for name, values in table["rows"].items():
            row = rows.setdefault(f"{name} [published: {table['source']}]", {})
            row.update(zip(table["metrics"], values, strict=True))
    return rows, list(reasons)


def tables() -> list[dict[str, Any]]:
    """The published tables, as the file has them."""
    found: list[dict[str, Any]] = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["table"]
    return found


def _unmet(table: Mapping[str, Any], result: RunResult) -> list[str]:
    """What a published table was measured with and a run was not."""
    if never := table.get("never"):
        return [str(never)]
    flat = {"own": []} | _flat(result.protocol) | {"backbone": result.backbone, "concepts": len(result.concepts)}
    wanted = {"own": [], **table["where"]}
    unmet = [
        f"{key} is {_told(flat.get(key))}, there {_told(value)}" for key, value in wanted.items() if flat.get(key) != value
    ]
    for metric in table["metrics"]:
        n = result.metrics[metric].n if metric in result.metrics else 0
        if n != table["n"]:
            unmet.append(f"{metric} is of {n} images, there of {table['n']}" if n else f"{metric} was not measured")
    return unmet


def _told(value: Any) -> str:
    return "not set" if value is None or value == [] else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
