"""Print a result of table.py as Markdown: one line a row, or with --row NAME one line for each concept of that row."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ERASED = 0.2  # a concept of which no more is seen counts as erased


def columns(row: Mapping[str, Any]) -> dict[str, int]:
    """Metric -> its digits: shares have three, others one; the distance to renders is left to the file."""
    shown = {name: m for name, m in row["metrics"].items() if not name.endswith("/renders]")}
    return {name: 3 if name.startswith(("acc", "h_o")) else 1 for name in shown}


def title(metric: str) -> str:
    """The metric without what it was measured with."""
    return metric.partition("[")[0]


def lines(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells))


def unedited(metrics: Mapping[str, Any], digits: Mapping[str, int]) -> list[str]:
    """What the unedited model reaches, where a metric says so."""
    return [f"{metrics[m]['base']:.{d}f}" if metrics[m]["base"] is not None else "" for m, d in digits.items()]


def runs_of(row: Mapping[str, Any]) -> str:
    """How many runs there were; where seeds gave the same erasure they are one, and how many seeds that was is said."""
    runs = row["runs"]
    different = {(one["concepts"], one.get("erasure_sha256", i)) for i, one in enumerate(runs)}
    alike = "" if len(different) == len(runs) else f" ({len(runs) / len(different):g} seeds alike)"
    return f"{len(different)}{alike}"


def by_row(table: Mapping[str, Any]) -> str:
    """Means with intervals, how many concepts are erased (in the mean of their seeds), runs, seconds, file and memory."""
    first = next(iter(table["rows"].values()))
    digits, cells = columns(first), []
    for name, row in table["rows"].items():
        found = [(row["metrics"][m], d) for m, d in digits.items()]
        left: dict[str, list[float]] = {}
        for one in row["runs"]:
            left.setdefault(one["concepts"], []).append(one["acc_e"])
        erased = f"{sum(round(float(np.mean(values)), 9) <= ERASED for values in left.values())} of {len(left)}"
        cells.append(
            [
                name,
                *(f"{m['mean']:.{d}f} ({m['ci95'][0]:.{d}f} to {m['ci95'][1]:.{d}f})" for m, d in found),
                erased,
                runs_of(row),
                *(f"{row[key]:.0f}" if key in row else "" for key in ("erase_s", "file_kb", "peak_memory_mb")),
            ]
        )
    cells.append(["unedited", *unedited(first["metrics"], digits), "", "", "", "", ""])
    header = ["row", *map(title, digits), f"acc_e <= {ERASED}", "runs", "erase, s", "file, kB", "peak, MB"]
    return lines(header, cells)


def by_concept(row: Mapping[str, Any]) -> str:
    """Of one row every concept, in the mean of its seeds, and the mean of all."""
    digits, own = columns(row), row["metrics"]
    concepts: dict[str, list[Mapping[str, Any]]] = {}
    for one in row["runs"]:
        concepts.setdefault(one["concepts"], []).append(one)
    cells = [
        [name, *(f"{np.mean([run[m] for run in runs if run[m] is not None]):.{d}f}" for m, d in digits.items())]
        for name, runs in concepts.items()
    ]
    mean = [f"{own[m]['mean']:.{d}f} ({own[m]['ci95'][0]:.{d}f} to {own[m]['ci95'][1]:.{d}f})" for m, d in digits.items()]
    cells += [["**mean**", *mean], ["unedited", *unedited(own, digits)]]
    return lines(["erased", *map(title, digits)], cells)


def main() -> None:
    """Print the table of a file."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("result", type=Path)
    args.add_argument("--row", help="show this row's concepts")
    given = args.parse_args()
    table = json.loads(given.result.read_text())
    print(by_concept(table["rows"][given.row]) if given.row else by_row(table))


if __name__ == "__main__":
    main()
