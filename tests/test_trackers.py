"""Trackers hear of runs: TensorBoard is read back, and what must not be sent is not there."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from erasekit.errors import EnvironmentProblem, ErasekitError, UsageError
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.preflight import check_tracker
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from erasekit_trackers import plugin, tracking


@pytest.fixture
def registries(world):
    found = plugins.load([world])
    if not found.manager.has_plugin("trackers"):  # installed metadata of before
        found.manager.register(plugin, "trackers")
    return found


@pytest.fixture
def track(tmp_path, registries, tiny_folder):
    """Run something with TensorBoard; what it was told."""

    def tracked(**flags):
        names = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat",), "tracker": "tensorboard"}
        config = build(names | flags, overrides=[f"backbone.path={tiny_folder}", "backbone.device=cpu"])
        result = run(config, out=tmp_path, registries=registries)
        path = path_of(tmp_path, resolve(config, registries))
        written = path / tracking.FOLDER / tracking.PROJECT
        return result, EventAccumulator(str(written), size_guidance={"images": 0}).Reload() if written.exists() else None, path

    return tracked


def test_losses_images_and_numbers_are_sent(track):
    result, found, path = track()
    assert [e.step for e in found.Scalars("train/pull")] == list(range(1, 13))
    assert all(e.value > 0 for e in found.Scalars("train/pull"))
    assert [e.step for e in found.Images("samples")] == [0, 3, 6, 9, 12]
    (value,) = found.Scalars("erased/acc_e")
    assert value.value == result.metrics["acc_e"].value
    assert found.Scalars("base/acc_e")[0].value == result.metrics["acc_e"].base
    (settings,) = (path / tracking.FOLDER / tracking.PROJECT).glob("*/hparams.yml")
    written = settings.read_text()
    assert "method.steps: 12" in written
    assert "protocol.guidance: 2.0" in written
    assert f"config_hash: {result.config_hash}" in written or f"config_hash: '{result.config_hash}'" in written


def test_images_of_a_blurred_task_are_never_sent(track, registries, monkeypatch):
    monkeypatch.setattr(registries.tasks.get("words", "mini"), "blurred", True)
    _, found, path = track()
    assert list((path / "samples").glob("step-*"))
    assert found.Tags()["images"] == []
    assert found.Scalars("train/pull")


def test_a_run_without_a_tracker_tells_none_and_has_the_same_name(track, tmp_path, registries, tiny_folder):
    _, found, path = track(tracker="")
    names = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat",), "tracker": "tensorboard"}
    config = build(names, overrides=[f"backbone.path={tiny_folder}", "backbone.device=cpu"])
    assert path_of(tmp_path, resolve(config, registries)) == path
    assert found is None
    assert not (path / tracking.FOLDER).exists()
    assert tracking._open == {}


def test_a_tracker_is_closed_whatever_becomes_of_the_run(track, registries, tiny_folder):
    with pytest.raises(ErasekitError, match=r"Training .pull. stopped at step 3"):
        track(options={"method": {"nan_at": 3}})
    assert tracking._open == {}


def test_a_tracker_that_does_not_exist_or_is_not_installed_is_said_before_the_run(tmp_path, track):
    with pytest.raises(UsageError, match=r"Unknown tracker 'tensorbord'. Did you mean 'tensorboard'\?"):
        track(tracker="tensorbord")
    assert not list(tmp_path.rglob("log.jsonl"))
    with pytest.raises(EnvironmentProblem, match=r"The tracker .clearml. is not installed\. Run .pip install clearml."):
        check_tracker("clearml")
