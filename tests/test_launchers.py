"""Launchers: one of a plugin, and Slurm's jobs on this machine."""

import os
import signal

import pytest

from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.registration import plugins
from erasekit.sweeps.sweep import How, sweep
from tests.sweeping import BOTH, FILES, IMAGES, counted, grid_of, lines_of, numbers


@pytest.fixture(scope="module")
def registries():
    return plugins.load(FILES)


@pytest.fixture(scope="module")
def alone(registries, tiny_folder, tmp_path_factory):
    """The numbers, by a launcher that a plugin registers."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTS", str(out / "counts.jsonl"))
        swept = sweep(grid_of(tiny_folder), registries, name="alone", out=out, how=How(launcher="in-process", plugins=FILES))
    assert counted(lines_of(out / "counts.jsonl")) == (BOTH, IMAGES, 1)
    return numbers(swept)


@pytest.mark.slow
def test_a_job_that_is_preempted_is_queued_again_and_goes_on(registries, tiny_folder, tmp_path, monkeypatch, alone):
    """submitit's own executor on this machine stands in for Slurm: the same jobs, signals and queueing."""
    monkeypatch.setenv("COUNTS", str(tmp_path / "counts.jsonl"))
    monkeypatch.setattr("erasekit.sweeps.sweep.POLL_S", 0.05)
    grid = grid_of(tiny_folder, on={"counted": {"options": {"method": {"pause": 0.05}}}})
    told = []

    def preempt(cells):
        loaded = [line["loaded"] for line in lines_of(tmp_path / "counts.jsonl") if "loaded" in line]
        if loaded and not told and any(state.stage.startswith("steps") for _, state in cells):
            told.append(loaded[-1])
            os.kill(loaded[-1], signal.SIGUSR2)

    how = How(launcher="slurm", workers=1, settings={"cluster": "local"}, plugins=FILES)
    swept = sweep(grid, registries, name="slurm", out=tmp_path / "runs", how=how, watch=preempt)
    assert told
    assert not swept.failed
    assert counted(lines_of(tmp_path / "counts.jsonl")) == (BOTH, IMAGES, 2)
    assert list(numbers(swept).values()) == list(alone.values())


def test_what_slurm_needs_is_said_in_a_line(registries, tiny_folder, tmp_path, monkeypatch):
    grid = grid_of(tiny_folder)
    with pytest.raises(UsageError, match="Say how many jobs"):
        sweep(grid, registries, name="slurm", out=tmp_path, how=How(launcher="slurm"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="Slurm is not here"):
        sweep(grid, registries, name="slurm", out=tmp_path, how=How(launcher="slurm", workers=2))


def test_settings_of_a_launcher_are_checked(registries, tiny_folder, tmp_path):
    with pytest.raises(UsageError, match=r"launcher\.thread"):
        sweep(grid_of(tiny_folder), registries, name="x", out=tmp_path, how=How(settings={"thread": 2}))
    with pytest.raises(UsageError, match=r"Unknown launcher 'slrm'\. Did you mean 'slurm'"):
        sweep(grid_of(tiny_folder), registries, name="x", out=tmp_path, how=How(launcher="slrm"))
