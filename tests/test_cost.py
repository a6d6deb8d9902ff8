"""What a plan takes: images counted once, passes, hours on this device, disk; and what has no room is said before it begins."""

from __future__ import annotations

import json
from collections import namedtuple

import pytest
import torch

from erasekit.backbones.timing import tflops
from erasekit.cli import main
from erasekit.errors import EnvironmentProblem
from erasekit.registration import plugins
from erasekit.runs import cost as module
from erasekit.runs.config import build
from erasekit.runs.cost import ESTIMATE, cost, runs_of
from erasekit.runs.preflight import erase_rows
from erasekit.runs.resolve import resolve
from erasekit.runs.room import SPARE_GB, check_room, disk_gb
from erasekit.runs.rundir import path_of, write_json

SMALL = ("task.profile=offline", "backbone.device=cpu")
CSV = "prompt,sd_seed,sd_image_width,sd_image_height\na red thing,1,512,512\na blue thing,2,512,256\n"
IMAGE_GB = 3 * 512 * 512 / 1e9


def planned(method="uce", backbone="sd15", task="objects", overrides=SMALL, **flags):
    return resolve(
        build({"method": method, "backbone": backbone, "task": task, **flags}, overrides=overrides), plugins.default()
    )


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A device that does one TFLOP in a second."""
    monkeypatch.setattr(module, "tflops", lambda device, dtype, family: 1.0)


def test_a_machine_that_never_ran_it_is_told_an_estimate(tmp_path):
    plan = planned(concepts=("cat",), limit=2)
    found = cost(plan, tmp_path)
    prompts = runs_of(plan)[0][1]
    assert (found.base_images, found.erased_images) == (len(prompts), len(prompts))
    assert found.image_s == pytest.approx(50 * 2 * 0.8)
    assert found.passes == pytest.approx(2 * len(prompts) * 100 + erase_rows(plan))
    assert found.hours == pytest.approx(found.passes * 0.8 / 3600)
    assert found.basis == ESTIMATE
    assert found.download_gb == pytest.approx(2, abs=0.1)


def test_images_of_the_base_are_counted_once_for_all_concepts(tmp_path):
    runs = runs_of(planned(limit=3))
    found = cost(planned(limit=3), tmp_path)
    every = [p for _, prompts in runs for p in prompts]
    assert len(runs) == 10
    assert found.erased_images == len(every)
    assert found.base_images == len({(p.text, p.seed) for p in every}) < len(every)


def test_prompts_of_other_sizes_take_as_much_as_they_are_large(tmp_path):
    (tmp_path / "prompts.csv").write_text(CSV)
    own = (*SMALL, f'task.sets.erase={{csv="{tmp_path}/prompts.csv"}}', "task.sets.preserve=0", "task.sets.clean=0")
    found = cost(planned(task="i2p", overrides=own), tmp_path)
    assert found.erased_images == 2
    assert found.image_s == pytest.approx(80 * (1 + 0.5) / 2, rel=0.01)
    assert found.disk_gb == pytest.approx(SPARE_GB + 2 * 1.5 * IMAGE_GB)


def test_nothing_is_guessed_of_a_mini_or_of_layers_that_are_brought_one_by_one(tmp_path):
    mini = cost(planned(backbone="sd15-mini", overrides=(), limit=2), tmp_path)
    assert (mini.hours, mini.basis) == (None, "")
    brought = planned(backbone="flux", task="free", concepts=("a cat",), overrides=("backbone.vram=8", "backbone.device=cpu"))
    assert cost(brought, tmp_path).hours is None


@pytest.mark.parametrize("family", ["unet", "transformer"])
def test_the_device_is_timed(family):
    assert 1e-6 < tflops(torch.device("cpu"), torch.float32, family) < 1e4


@pytest.fixture
def disk(monkeypatch):
    """Sets how many GB the disk has free."""
    usage = namedtuple("usage", "total used free")
    return lambda gb: monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**15, 10**15, int(gb * 1e9)))


def test_all_runs_of_a_plan_have_to_fit_before_the_first_begins(tmp_path, disk, monkeypatch):
    monkeypatch.setattr("erasekit.runs.room.to_download", lambda plan: (0.0, tmp_path))
    runs = runs_of(planned(limit=5))
    need = disk_gb(runs, tmp_path)
    disk(need / 2)
    check_room(runs[:1], tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"needs up to .* images of each side\), which has .* free\. Free some"):
        check_room(runs, tmp_path)
    disk(need * 1.01)
    check_room(runs, tmp_path)
    monkeypatch.setattr("erasekit.runs.room.to_download", lambda plan: (5.0, tmp_path / "hub"))
    with pytest.raises(EnvironmentProblem, match="and 5 GB of weights on the same disk"):
        check_room(runs, tmp_path)


def test_what_is_there_already_needs_no_room(tmp_path):
    plan = planned(concepts=("cat",), limit=5)
    n, whole = len(runs_of(plan)[0][1]), disk_gb(runs_of(plan), tmp_path)
    assert whole == pytest.approx(SPARE_GB + 2 * n * IMAGE_GB)
    path_of(tmp_path, plan).mkdir(parents=True)
    for stages, left in ((["base_images"], SPARE_GB + n * IMAGE_GB), (["base_images", "erase", "sample"], 0.0)):
        status = {"schema_version": 1, "state": "running", "finished": stages, "timings_s": {}, "starts": 1}
        write_json(path_of(tmp_path, plan) / "status.json", status)
        assert disk_gb(runs_of(plan), tmp_path) == pytest.approx(left)


def test_whole_weights_and_their_checkpoint_are_counted(tmp_path):
    lora, full = (
        planned("esd", overrides=(*SMALL, f"method.weights={w}"), concepts=("cat",), limit=1) for w in ("lora", "full")
    )
    assert disk_gb(runs_of(full), tmp_path) > disk_gb(runs_of(lora), tmp_path) + 1


def test_a_dry_run_says_all_of_it_and_stops_where_the_disk_is_full(tmp_path, disk, monkeypatch, capsys, tiny_folder):
    monkeypatch.chdir(tmp_path)
    flags = ["run", "--dry-run", "-m", "uce", "-b", "sd15", "-t", "objects", "-s", f"backbone.path={tiny_folder}"]
    flags += ["-s", "task.profile=offline", "-s", "protocol.size=16"]
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cost"]["hours"] > 0
    assert "(an estimate" in found["stages"]["together"]
    assert "GB of disk at most" in found["stages"]["together"]
    disk(0.5)
    assert main(flags) == 3
    assert "needs up to" in capsys.readouterr().err
    assert main([word for word in flags if word != "--dry-run"]) == 3
    assert "needs up to" in capsys.readouterr().err
    assert list(tmp_path.glob("runs/**/*.png")) == []
