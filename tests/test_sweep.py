"""Sweeps in the tiny world: what was done is counted by the model and the method themselves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from erasekit.errors import ErasekitError, UsageError
from erasekit.evaluation.results import read_result
from erasekit.registration import plugins
from erasekit.sweeps.cells import cells_of, seen
from erasekit.sweeps.suite import Suite, of_method, parse_row, read_suite, rows_of
from erasekit.sweeps.sweep import How, sweep
from tests.conftest import THIRD_PARTY

ROOT = Path(__file__).parents[1]
FILES = (THIRD_PARTY / "tiny_world.py", THIRD_PARTY / "counted.py")
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def registries():
    return plugins.load(FILES)


@pytest.fixture
def suite(tiny_folder):
    def made(**changes):
        where = {"path": str(tiny_folder), "device": "cpu"}
        values = {"methods": ("counted",), "backbones": ("counted",), "seeds": SEEDS, "tasks": ("words",)}
        return Suite(**{**values, "run": {"options": {"backbone": where}}, **changes})

    return made


@pytest.fixture
def counts(tmp_path, monkeypatch):
    """What was counted so far: erasures, images, loads."""
    file = tmp_path / "counts.jsonl"
    monkeypatch.setenv("COUNTS", str(file))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]))

    def read():
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        file.unlink(missing_ok=True)
        erased = sorted((line["erased"], line["seed"]) for line in lines if "erased" in line)
        images = sum(line.get("images", 0) for line in lines)
        return erased, images, sum("loaded" in line for line in lines)

    return read


def numbers(swept):
    return {cell.path: read_result(swept.out / cell.path / "results.json").metrics for cell, _ in swept.cells}


BOTH = [("cat", 0), ("cat", 1), ("dog", 0), ("dog", 1)]
IMAGES = 2 * 5 + 4 * 5  # the base's of two concepts once, and those of four erasures


@pytest.fixture(scope="module")
def alone(registries, tiny_folder, tmp_path_factory):
    """The numbers of an undisturbed sweep with one worker."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("alone")
        patch.setenv("COUNTS", str(folder / "counts"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]))
        where = {"path": str(tiny_folder), "device": "cpu"}
        grid = Suite(methods=("counted",), backbones=("counted",), tasks=("words",), seeds=SEEDS, run={"options": {"backbone": where}})
        return numbers(sweep(grid, registries, name="alone", out=folder, how=How(plugins=FILES)))


def test_a_sweep_does_every_cell_once_and_another_one_nothing(suite, registries, counts, tmp_path, alone):
    out, watched = tmp_path / "runs", []
    how = How(workers=2, plugins=FILES)
    swept = sweep(suite(), registries, name="two", out=out, how=how, watch=watched.append)
    assert not swept.failed
    assert numbers(swept) == alone
    erased, images, loads = counts()
    assert (erased, images) == (BOTH, IMAGES)
    assert loads <= 2  # a worker keeps its model
    states = [how.state for cells in watched for _, how in cells]
    assert {"waiting", "begun", "finished"} >= set(states) >= {"finished"}
    again = sweep(suite(), registries, name="two", out=out, how=how)
    assert numbers(again) == alone
    assert counts() == ([], 0, 0)
    assert again.folder == swept.folder
