"""A table over methods or ablations, concepts and seeds: runs what is missing, then means with intervals over all runs.

    python benchmarks/table.py --rows trace uce --backbone sd15-mini --concepts cat dog --seeds 0 1 2 --out results/methods.json
    python benchmarks/table.py --rows trace --ablations --concepts cat+dog --seeds 0 1 2 --out results/ablations.json

A concept written `cat+dog` is one run that erases both. Everything is measured by `erasekit.run`; a run that is finished
is not done again, so the script can be stopped and started. A row's memory and seconds are those of the process that did
it. Intervals are 95 %. The images of a concept have the same prompts and noise at every seed, so that seeds are no further
sample of them: concepts are what is resampled, each with the mean of its seeds. The interval is the wider one of that
bootstrap and of the mean of the concepts' own intervals, since concepts that all agree are no proof that the next one would.
Seeds of a method that has no use for one, as closed forms have none, give one erasure, and count as one run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import record
import show
from erasekit.evaluation.results import Metric, RunResult
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run

RESAMPLES = 2000
FILES = ("all.safetensors", "guidance.json", "guidance.safetensors")  # what a user loads


def variants(methods: Sequence[str], *, ablations: bool) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Row name -> (method, its overrides)."""
    rows: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for method in methods:
        rows[method] = (method, {})
        if ablations:
            of = default().methods.get(method).ablations
            rows |= {f"{method} {name}": (method, overrides) for name, overrides in of.items()}
    return rows


def interval(concepts: Sequence[Sequence[Metric]]) -> list[float]:
    """A 95 % interval of the mean over concepts, each with its runs at several seeds.

    The wider of a bootstrap over concepts and of MOVER over their own intervals, where a concept has the mean value and the
    mean interval of its runs.
    """
    values = np.array([np.mean([m.value for m in runs]) for runs in concepts])
    draws = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(draws.mean(1), (2.5, 97.5))
    if all(m.ci95 for runs in concepts for m in runs):
        ends = np.array([np.mean([m.ci95 for m in runs], 0) for runs in concepts])
        below, above = np.sqrt(np.square(ends - values[:, None]).sum(0)) / len(values)
        low, high = min(low, values.mean() - below), max(high, values.mean() + above)
    return [round(float(low), 4), round(float(high), 4)]


def distinct(runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs of one concept without those that gave the same erasure: of a closed form all seeds are one run."""
    return list({run.erasure_sha256: run for run in runs}.values())


def summary(concepts: Sequence[Sequence[RunResult]]) -> dict[str, Any]:
    """Of every metric that all runs have the mean over concepts, each with its seeds; the time to erase and the memory.

    Seeds that gave the same erasure count once, in `runs` and `images` too.
    """
    seconds = [r.timings_s["erase"] for runs in concepts for r in runs]
    concepts = [distinct(runs) for runs in concepts]
    results = [result for runs in concepts for result in runs]
    names = [name for name in results[0].metrics if all(r.metrics.get(name) for r in results)]
    metrics = {}
    for name in names:
        known = [[m for r in runs if (m := r.metrics[name]).value is not None] for runs in concepts]
        known = [runs for runs in known if runs]
        means = [np.mean([m.value for m in runs]) for runs in known]
        bases = [m.base for runs in known for m in runs]
        metrics[name] = {
            "mean": round(float(np.mean(means)), 4),
            "ci95": interval(known),
            "base": round(float(np.mean(bases)), 4) if None not in bases else None,
            "runs": sum(map(len, known)),
            "images": sum(r.metrics[name].n for r in results),
        }
    peak = max(r.peak_memory_mb for r in results)
    return {"metrics": metrics, "erase_s": round(float(np.median(seconds)), 2), "peak_memory_mb": peak}


def row_of(name: str, args: argparse.Namespace, method: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """One row: every concept and seed, run if it is missing."""
    results, each, sizes = [], [], []
    for concepts in args.concepts:
        results.append([])
        for seed in args.seeds:
            flags = {"method": method, "backbone": args.backbone, "task": args.task, "concepts": tuple(concepts.split("+"))}
            settings = [*args.set, *(f"method.{key}={value}" for key, value in overrides.items())]
            config = build({**flags, "seed": seed, "limit": args.limit}, overrides=settings)
            result = run(config, out=args.runs)
            results[-1].append(result)
            folder = path_of(args.runs, resolve(config, default())) / "erasure"
            sizes.append(sum((folder / file).stat().st_size for file in FILES if (folder / file).exists()) / 1000)
            values = {k: m.value for k, m in result.metrics.items()}
            each.append({"concepts": concepts, "seed": seed, "erasure_sha256": result.erasure_sha256, **values})
            print(name, each[-1], file=sys.stderr, flush=True)
    return summary(results) | {"file_kb": round(float(np.median(sizes)), 1), "runs": each}


def _flags(args: argparse.Namespace) -> dict[str, list[Any]]:
    """The flags that decide the numbers: not where files lie."""
    values = {k: v for k, v in vars(args).items() if k not in ("runs", "out") and v not in (None, False, [])}
    return {f"--{k}": [] if v is True else v if isinstance(v, list) else [v] for k, v in values.items()}


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
    given = [word for flag, values in _flags(args).items() for word in (flag, *map(str, values))]
    rows = {}
    for name, (method, overrides) in variants(args.rows, ablations=args.ablations).items():
        # A process of its own, so that a row's peak memory is its own too.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows[name] = pool.submit(row_of, name, args, method, overrides).result()
    table = {
        "command": f"python benchmarks/table.py {shlex.join(given)}",
        "machine": record.machine(),
        "rows": rows,
    }
    record.write(table, args.out)
    print(show.by_row(table))


if __name__ == "__main__":
    main()
