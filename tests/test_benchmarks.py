"""The benchmarks run: at tiny size, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import show
import table
from erasekit.results import Metric, RunResult

ROOT = Path(__file__).parents[1]


def test_the_gpu_benchmark_runs_at_tiny_size(tmp_path):
    script = ROOT / "benchmarks" / "gpu" / "bench.py"
    arguments = ["--tiny", "--device", "cpu", "--steps", "2", "--vram", "80", "8", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")])}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for family in ("sd15", "flux"):
        report = json.loads((tmp_path / f"gpu-{family}-tiny.json").read_text())
        assert report["methods"]["trace"]["step_s"] > 0
        assert [report["vram"][v]["erase_s"] > 0 for v in ("80", "8")] == [True, True]
        assert report["raw"]["trace_ratio"] > 0
        assert report["sampling"]["erasekit_pictures_per_s"] > 0


def shares(*values):
    return [
        Metric(value=v, ci95=(max(0.0, v - 0.1), min(1.0, v + 0.1)), n=20, higher_is_better=False, evaluator="x@1")
        for v in values
    ]


def test_seeds_that_agree_do_not_narrow_an_interval():
    once = [shares(v) for v in (0.0, 0.1, 0.4)]
    assert table.interval([runs * 3 for runs in once]) == table.interval(once)


def test_an_interval_is_no_narrower_than_the_runs_own_and_covers_the_spread_of_concepts():
    low, high = table.interval([shares(0.5)] * 4)  # all agree: the mean of four independent intervals of 0.1
    assert (low, high) == pytest.approx((0.45, 0.55), abs=1e-4)
    low, high = table.interval([shares(v) for v in (0.0, 0.0, 1.0, 1.0)])
    assert low <= 0.1
    assert high >= 0.9


TABLES = [p for p in sorted((ROOT / "benchmarks" / "results").glob("*.json")) if "rows" in json.loads(p.read_text())]


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_every_committed_table_is_printed_with_every_row_and_concept(path):
    """That of the ablations has no sizes of files."""
    result = json.loads(path.read_text())
    rows = show.by_row(result).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {name}" for name in (*result["rows"], "unedited")]
    assert {row.count("|") for row in rows} == {rows[0].count("|")}
    first = next(iter(result["rows"].values()))
    concepts = show.by_concept(first).splitlines()
    assert len(concepts) == 2 + len({run["concepts"] for run in first["runs"]}) + 2


def result_of(concept, seed, sha256):
    metrics = {"acc_e": shares(0.1 * seed)[0]}
    named = {"method": "m", "backbone": "b", "task": "t", "domain": "mini", "config_hash": "x", "protocol": {"hash": "x"}}
    cost = {"counts": {}, "timings_s": {"erase": 1.0}, "peak_memory_mb": 1.0}
    return RunResult(**named, **cost, concepts=(concept,), seed=seed, metrics=metrics, erasure_sha256=sha256)


def test_seeds_of_a_closed_form_are_one_run():
    same = [[result_of(c, 0, c) for _ in range(3)] for c in ("cat", "dog")]
    other = [[result_of(c, seed, f"{c}{seed}") for seed in range(3)] for c in ("cat", "dog")]
    closed, trained = table.summary(same)["metrics"]["acc_e"], table.summary(other)["metrics"]["acc_e"]
    assert (closed["runs"], closed["pictures"]) == (2, 40)
    assert (trained["runs"], trained["pictures"]) == (6, 120)
    row = {"runs": [{"concepts": r.concepts[0], "erasure_sha256": r.erasure_sha256} for runs in same for r in runs]}
    assert show.runs_of(row) == "2 (3 seeds alike)"
    row = {"runs": [{"concepts": r.concepts[0], "erasure_sha256": r.erasure_sha256} for runs in other for r in runs]}
    assert show.runs_of(row) == "6"


def test_a_share_of_exactly_the_limit_counts_as_erased_however_many_seeds():
    """The mean of three times 0.2 is a little more than 0.2 in floating point."""
    metric = {"mean": 0.2, "ci95": [0.1, 0.3], "base": 1.0}
    runs = [{"concepts": "cat", "acc_e": 0.2}] * 3 + [{"concepts": "dog", "acc_e": 0.25}] * 3
    row = {"metrics": {"acc_e": metric}, "runs": runs, "erase_s": 1.0, "file_kb": 1.0, "peak_memory_mb": 1.0}
    assert "| 1 of 2 |" in show.by_row({"rows": {"sld": row}})
