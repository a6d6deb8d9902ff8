"""The benchmarks run: at tiny size, on a CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


GPU = ROOT / "benchmarks" / "gpu"


def script(name, *arguments):
    command = [sys.executable, GPU / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")) + sorted(GPU.glob("*.py")), ids=lambda p: p.stem)
def test_every_script_finds_what_it_imports(path, monkeypatch):
    """One that is run twice a year breaks unseen when what it borrows moves."""
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)


def test_what_a_killed_run_did_twice_is_counted(tmp_path, monkeypatch):
    """Three trainings of four steps, killed after the first, in the third, and again while six images are drawn."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    of_run = importlib.import_module("computed_twice").of_run

    def started(resumed):
        about = {"method": "m", "backbone": "b", "task": "t", "concepts": ["cat"], "config_hash": "0" * 8, "tracker": ""}
        return {"event": "RunStarted", **about, "resumed": resumed, "settings": {}}

    def steps(*numbers):
        return [{"event": "StepEnd", "step": n, "total": 4, "values": {"loss": 1.0}} for n in numbers]

    def images(which, *done):
        return [{"event": "Sampled", "which": which, "done": n, "total": 6} for n in done]

    stage = {"event": "StageStarted", "stage": "erase"}
    saved = {"event": "Saved", "path": "erasure", "sha256": "f" * 64}
    events = [started(False), *images("base", 2, 6), stage, *steps(1, 2, 3, 4)]
    events += [started(True), *images("base", 6), stage, *steps(1, 2, 3, 4, 1, 2, 3)]
    events += [started(True), *images("base", 6), stage, *steps(3, 4), saved, *images("erased", 0, 3)]
    taken = {"event": "Noted", "line": "Run 00000000 has computed this erasure"}  # as if it had been taken from another run
    events += [started(True), stage, taken, saved, *images("erased", 2, 6)]  # one of the three had not reached the disk
    lines = [json.dumps({"time": "2026-01-01T00:00:00.000+00:00", **event}) for event in events]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    for which in ("base", "erased"):
        (tmp_path / "images" / which).mkdir(parents=True)
        index = [{"file": f"{seed}.png", "text": "a cat", "seed": seed} for seed in range(6)]
        (tmp_path / "images" / which / "index.json").write_text(json.dumps(index))
    assert dict(of_run(tmp_path)) == {
        "runs": 1,
        "starts": 4,
        "erasures": 1,
        "training_steps": 13,
        "training_steps_again": 1,
        "base_images": 4,
        "base_images_of_runs": 6,
        "erased_images": 7,
        "erased_images_again": 1,
    }


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


def test_the_table_of_images_drawn_once_sums_what_is_apart_and_names_numbers_that_differ(tmp_path):
    run = {"wall_s": 2.0, "cpu_s": 1.0, "base_images": 4, "erased_images": 4, "metrics": {"cat": {"acc_e": 0.0}}}
    runs = {f"apart uce {name}": run | {"metrics": {name: {"acc_e": 0.0}}} for name in ("cat", "dog")}
    both = {"cat": {"acc_e": 0.0}, "dog": {"acc_e": 0.5}}
    runs["together uce"] = run | {"base_images": 5, "erased_images": 8, "metrics": both}
    (tmp_path / "once.json").write_text(json.dumps({"runs": runs}))
    command = [sys.executable, ROOT / "benchmarks" / "drawn_once.py", "--out", tmp_path / "once.json", "--table"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| apart | 2 | 8 | 8 | 4 | 2 |" in done.stdout
    assert "| together | 1 | 5 | 8 | 2 | 1 |" in done.stdout
    assert "Numbers that differ: uce dog acc_e." in done.stdout
