"""A table over methods or ablations, concepts and seeds: runs what is missing, then means with intervals over all runs.

    python benchmarks/table.py --rows trace uce --backbone sd15-mini --concepts cat dog --seeds 0 1 2 --out results/methods.json
    python benchmarks/table.py --rows trace --ablations --concepts cat+dog --seeds 0 1 2 --out results/ablations.json

A concept written `cat+dog` is one run that erases both. Everything is measured by `erasekit.run`; a run that is finished
is not done again, so the script can be stopped and started. Intervals are 95 %, by a bootstrap over runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erasekit.config import build
from erasekit.plugins import default
from erasekit.results import RunResult
from erasekit.runner import run

RESAMPLES = 2000


def variants(methods: Sequence[str], *, ablations: bool) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Row name -> (method, its overrides)."""
    rows: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for method in methods:
        rows[method] = (method, {})
        if ablations:
            of = default().methods.get(method).ablations
            rows |= {f"{method} {name}": (method, overrides) for name, overrides in of.items()}
    return rows


def interval(values: Sequence[float]) -> list[float]:
    """A 95 % interval of the mean by a bootstrap over runs."""
    draws = np.random.default_rng(0).choice(np.array(values), (RESAMPLES, len(values)))
    return [round(float(v), 4) for v in np.percentile(draws.mean(1), (2.5, 97.5))]


def summary(results: Sequence[RunResult]) -> dict[str, Any]:
    """Means over runs of every metric that all of them have, of the time to erase and of the memory."""
    names = [name for name in results[0].metrics if all(r.metrics.get(name) for r in results)]
    metrics = {}
    for name in names:
        values = [r.metrics[name].value for r in results]
        bases = [r.metrics[name].base for r in results]
        known = [v for v in values if v is not None]
        metrics[name] = {
            "mean": round(float(np.mean(known)), 4),
            "ci95": interval(known),
            "base": round(float(np.mean(bases)), 4) if None not in bases else None,
            "runs": len(known),
            "pictures": sum(r.metrics[name].n for r in results),
        }
    seconds = [r.timings_s["erase"] for r in results]
    peak = max(r.peak_memory_mb for r in results)
    return {"metrics": metrics, "erase_s": round(float(np.median(seconds)), 2), "peak_memory_mb": peak}


def main() -> None:
    """Run and write the table."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--rows", nargs="+", required=True, help="methods")
    args.add_argument("--ablations", action="store_true", help="a row for each declared ablation too")
    args.add_argument("--backbone", default="sd15-mini")
    args.add_argument("--task", default="objects")
    args.add_argument("--concepts", nargs="+", required=True)
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args.add_argument("--limit", type=int, help="prompts per prompt set; all of them, if left out")
    args.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every row")
    args.add_argument("--runs", type=Path, default=Path("runs"))
    args.add_argument("--out", type=Path, required=True)
    args = args.parse_args()
    rows = {}
    for row, (method, overrides) in variants(args.rows, ablations=args.ablations).items():
        results, each = [], []
        for concepts in args.concepts:
            for seed in args.seeds:
                flags = {"method": method, "backbone": args.backbone, "task": args.task, "concepts": tuple(concepts.split("+"))}
                settings = [*args.set, *(f"method.{key}={value}" for key, value in overrides.items())]
                result = run(build({**flags, "seed": seed, "limit": args.limit}, overrides=settings), out=args.runs)
                results.append(result)
                values = {k: m.value for k, m in result.metrics.items()}
                each.append({"concepts": concepts, "seed": seed, "erasure_sha256": result.erasure_sha256, **values})
                print(row, each[-1], file=sys.stderr, flush=True)
        rows[row] = summary(results) | {"runs": each}
    table = {
        "command": shlex.join(["python", "benchmarks/table.py", *sys.argv[1:]]),
        "machine": {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
