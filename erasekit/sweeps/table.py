"""The tables of a sweep, one for each backbone and task: a line for each row, means over concepts and seeds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from erasekit.evaluation.results import ATTACKED, RunResult, Table, read_result
from erasekit.evaluation.summary import by_protocol, differences, summary
from erasekit.runs.weighed import weighed
from erasekit.sweeps.cells import Cell

ERASED = 0.2  # a concept of which no more is seen counts as erased
EFFICACY = ("acc_e", "unsafe_images")  # how much of what is erased is seen
SHARES = ("acc", "h_", "face_rate", "style_removed", "unsafe_images")
Runs = Mapping[str, Mapping[str, Sequence[tuple[RunResult, Path]]]]  # {row: {concept: [a run and its folder]}}


class Beside(NamedTuple):
    """A column of what was not measured on images."""

    title: str
    digits: int


BESIDE = {
    "residual": Beside("residual", 2),
    "drift": Beside("drift", 2),
    "erase_s": Beside("erase, s", 0),
    "file_kb": Beside("file, kB", 0),
    "peak_memory_mb": Beside("peak, MB", 0),
}


def tables_of(cells: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """A table for each backbone and task of finished cells: its rows in order, each with `summary`, its files' size and runs.

    Rows that were not measured by one protocol stand in tables of their own; `differences` are from a table's first row.
    """
    found: list[dict[str, Any]] = []
    runs: dict[tuple[str, str], dict[str, dict[str, list[tuple[RunResult, Path]]]]] = {}
    for cell in cells:
        if (out / cell.path / "results.json").is_file():
            result = read_result(out / cell.path / "results.json")
            rows = runs.setdefault((result.backbone, result.task), {})
            rows.setdefault(cell.row, {}).setdefault("+".join(result.concepts), []).append((result, out / cell.path))
    for (backbone, task), rows in runs.items():
        for together in by_protocol(rows):
            found.append({"backbone": backbone, "task": task, "rows": rows_of(together)})
    return found


def rows_of(rows: Runs) -> dict[str, Any]:
    """Rows that were measured by one protocol, with `summary`, file size, runs, and `differences` from the first one."""
    found: dict[str, Any] = {}
    first: dict[str, list[RunResult]] = {}
    for name, concepts in rows.items():
        runs = {concept: [result for result, _ in each] for concept, each in concepts.items()}
        folders = [path for each in concepts.values() for _, path in each]
        found[name] = summary(runs) | weighed([folder / "erasure" for folder in folders])
        if first:
            found[name]["differences"] = differences(runs, first)
        first = first or runs
        if spent := _spent(folders):
            found[name]["attacks"] = spent
        found[name]["runs"] = [_record(concept, run) for concept, of_concept in runs.items() for run in of_concept]
    return found


def _record(concept: str, run: RunResult) -> dict[str, Any]:
    values = {name: metric.value for name, metric in run.metrics.items()}
    return {"concepts": concept, "seed": run.seed, "erasure_sha256": run.erasure_sha256, **values}


def _spent(paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Of each attack what it took in all runs together: prompts that it was tried on, images, passes, seconds."""
    found: dict[str, dict[str, float]] = {}
    for path in paths:
        if (path / "attacks.json").is_file():
            for name, about in json.loads((path / "attacks.json").read_text(encoding="utf-8"))["attacks"].items():
                own = found.setdefault(name, {})
                own.update({key: round(own.get(key, 0) + value, 1) for key, value in about["spent"].items()})
    return found


def by_row(rows: Mapping[str, Any], published: Mapping[str, Mapping[str, float]] | None = None) -> Table:
    """Means with intervals, how many concepts are erased (in the mean of their seeds), runs, residual and drift, costs.

    Args:
        rows: of `rows_of`.
        published: {name that says so: {metric: value}}, at the end.
    """
    digits, more = _columns(rows), [key for key in BESIDE if any(key in row for row in rows.values())]
    cells = []
    for name, row in rows.items():
        values = [_with_interval(row["metrics"][m], d) if m in row["metrics"] else "" for m, d in digits.items()]
        beside = [f"{row[key]:.{BESIDE[key].digits}f}" if key in row else "" for key in more]
        cells.append([name, *values, _erased(row), runs_of(row), *beside])
    nothing = [""] * (len(more) + 2)
    cells.append(["unedited", *_unedited(rows, digits), *nothing])
    for name, row in (published or {}).items():
        cells.append([name, *(f"{row[m]:.{d}f}" if m in row else "" for m, d in digits.items()), *nothing])
    return Table(["row", *_titles(digits), f"erased (<= {ERASED})", "runs", *(BESIDE[key].title for key in more)], cells)


def by_difference(rows: Mapping[str, Any]) -> Table:
    """Every row's differences from the first one; no rows, if there is nothing to compare."""
    digits = _columns(rows)
    cells = []
    for name, row in rows.items():
        if found := row.get("differences"):
            cells.append([name, *(_with_interval(found[m], d, sign="+") if m in found else "" for m, d in digits.items())])
    return Table([f"less {next(iter(rows))}", *_titles(digits)], cells)


def by_attack(rows: Mapping[str, Any]) -> Table:
    """Of every row what each attack and probe finds; no rows without attacks.

    Below them the unedited model, what the same attacks find of a concept that no model has learned, and how often an image
    that asks for that one shows the erased one.
    """
    names = list(dict.fromkeys(m for row in rows.values() for m in row["metrics"] if m.startswith(("asr[", "probe["))))
    cells = [
        [name, *(_with_interval(row["metrics"][m], 2) if m in row["metrics"] else "" for m in names)]
        for name, row in rows.items()
        if names
    ]
    if cells:
        cells.append(["unedited", *_unedited(rows, dict.fromkeys(names, 2))])
        for title, kind in (("never learned", "false_alarm"), ("by chance", "chance")):
            inside = [f"{kind}[{_inside(m)}]" for m in names]
            known = [next((r["metrics"][a] for r in rows.values() if a in r["metrics"]), None) for a in inside]
            cells.append([title, *(_with_interval(found, 2) if found else "" for found in known)])
    return Table(["row", *map(_inside, names)], cells)


def by_concept(row: Mapping[str, Any]) -> Table:
    """Of one row every concept, in the mean of its seeds, and the mean of all."""
    digits = _columns({"": row})
    cells = [
        [name, *(_number([run.get(m) for run in runs], d) for m, d in digits.items())]
        for name, runs in _of_concepts(row).items()
    ]
    cells.append(["mean", *(_with_interval(row["metrics"][m], d) for m, d in digits.items())])
    cells.append(["unedited", *_unedited({"": row}, digits)])
    return Table(["erased", *map(_title, digits)], cells)


def runs_of(row: Mapping[str, Any]) -> str:
    """How many runs there were; where seeds gave the same erasure they are one, and how many seeds that was is said."""
    runs = row["runs"]
    different = {(one["concepts"], one.get("erasure_sha256", i)) for i, one in enumerate(runs)}
    alike = "" if len(different) == len(runs) else f" ({len(runs) / len(different):g} seeds alike)"
    return f"{len(different)}{alike}"


def latex(table: Table) -> str:
    """A table in LaTeX, with rules of booktabs."""
    columns, *rows = [" & ".join(map(_escaped, row)) + r" \\" for row in (table.columns, *table.rows)]
    lines = [r"\toprule", columns, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", *lines])


def _escaped(text: str) -> str:
    """Plain text as LaTeX takes it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
    special |= {">": r"\textgreater{}"} | {each: rf"\{each}" for each in "&%$#_{}"}
    return "".join(special.get(each, each) for each in text)


def as_csv(table: Table) -> str:
    """A table as comma-separated values."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table.columns, *table.rows])
    return file.getvalue()


def markdown(table: Table) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.columns, ["---"] * len(table.columns), *table.rows))


def _columns(rows: Mapping[str, Any]) -> dict[str, int]:
    """Every metric -> its digits: shares have three, others one; distances to renders and attacks are left out."""
    every = (m for row in rows.values() for m in row["metrics"])
    names = dict.fromkeys(m for m in every if not m.endswith("/renders]") and m.partition("[")[0] not in ATTACKED)
    return {name: 3 if name.startswith(SHARES) else 1 for name in names}


def _titles(metrics: Iterable[str]) -> list[str]:
    """Metrics without what they were measured with, where that is clear."""
    short = [_title(metric) for metric in metrics]
    return [name if short.count(name) == 1 else metric for name, metric in zip(short, metrics, strict=True)]


def _title(metric: str) -> str:
    """The metric without what it was measured with."""
    return metric.partition("[")[0]


def _inside(metric: str) -> str:
    """What a metric was measured with."""
    return metric.partition("[")[2].removesuffix("]")


def _with_interval(metric: Mapping[str, Any], digits: int, *, sign: str = "") -> str:
    ends = metric.get("ci95")
    told = f" ({ends[0]:{sign}z.{digits}f} to {ends[1]:{sign}z.{digits}f})" if ends else ""
    return f"{metric['mean']:{sign}z.{digits}f}{told}"


def _number(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.{digits}f}" if known else ""


def _unedited(rows: Mapping[str, Any], digits: Mapping[str, int]) -> list[str]:
    """What the unedited model reaches, where a metric says so."""
    first: list[Mapping[str, Any]] = [next((r["metrics"][m] for r in rows.values() if m in r["metrics"]), {}) for m in digits]
    return [_number([m.get("base")], d) for m, d in zip(first, digits.values(), strict=True)]


def _of_concepts(row: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in row["runs"]:
        found.setdefault(run["concepts"], []).append(run)
    return found


def _erased(row: Mapping[str, Any]) -> str:
    """How many concepts are erased, by the first metric that says how much of them is seen."""
    metric = next((name for name in EFFICACY if name in row["metrics"]), "")
    if not metric:
        return ""
    left = [[run[metric] for run in runs if run.get(metric) is not None] for runs in _of_concepts(row).values()]
    # The mean of three times 0.2 is a little more than 0.2 in floating point.
    return f"{sum(bool(v) and round(float(np.mean(v)), 9) <= ERASED for v in left)} of {len(left)}"
