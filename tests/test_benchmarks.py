"""The benchmarks run: at tiny size, on a CPU."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import show
import table
from erasekit.evaluation.results import Metric, RunResult

ROOT = Path(__file__).parents[1]


GPU = ROOT / "benchmarks" / "gpu"


def script(name, *arguments):
    command = [sys.executable, GPU / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_gpu_benchmark_goes_on_where_it_stopped(tmp_path):
    """At tiny size: a row that is measured, one that fails, each once; then the table."""
    out = tmp_path / "gpu.json"
    # Four bits need a GPU, so the second row fails here for sure.
    where = ("--tiny", "--work", tmp_path, "--out", out, "--rows", "flux-esd-512-80", "flux-uce-512-8", "flux-trace-512-24")
    assert "budget is spent" in script("bench.py", *where, "--budget", "0")
    assert not out.exists()
    script("bench.py", *where)
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["flux-esd-512-80", "flux-trace-512-24", "flux-uce-512-8"]
    esd, trace, uce = rows.values()
    assert esd["stages"].keys() == {"load", "encode", "erase", "save"}
    assert esd["step_s"] > 0
    assert esd["protocol"]["steps"] == 4
    assert {"steps": 5, "weights": "lora", "trajectories": 24}.items() <= esd["settings"].items()
    assert esd["rows"]["n"] >= 24 * 4 * 3  # three predictions at each point
    assert "failed" in trace
    assert "failed" not in esd
    assert uce["images"] == {"n": 4, "steps": 28}
    before = out.read_text()
    assert script("bench.py", *where) == ""
    assert out.read_text() == before
    assert "flux-trace-512-24" in script("bench.py", *where, "--retry")

    table = {line.split("`")[1]: line.split(" | ") for line in script("project.py", out).splitlines()[2:]}
    assert table.keys() == rows.keys()
    assert table["flux-trace-512-24"][4] == "failed"
    usual = 200  # training steps of ESD
    assert float(table["flux-esd-512-80"][4]) >= 0.9 * usual * esd["step_s"]


def test_a_row_that_takes_too_long_is_stopped_and_says_so(tmp_path):
    out = tmp_path / "gpu.json"
    where = ("--tiny", "--work", tmp_path, "--out", out, "--rows", "sd15-uce-512-8")
    assert "FAILED stopped after 0 s" in script("bench.py", *where, "--row-limit", "0.1")
    assert json.loads(out.read_text())["rows"]["sd15-uce-512-8"]["failed"] == "stopped after 0 s"


def test_a_checkouts_plugins_are_found_by_metadata_that_is_written_for_it(tmp_path):
    script("metadata.py", tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert found.name == "erasekit"
    points = {p.name: p.value for p in found.entry_points if p.group == "erasekit"}
    assert points == project["entry-points"]["erasekit"]


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
    assert (closed["runs"], closed["images"]) == (2, 40)
    assert (trained["runs"], trained["images"]) == (6, 120)
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
