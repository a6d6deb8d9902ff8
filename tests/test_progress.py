"""What a run says of its progress: every kind of work that may take long, each with a clock of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasekit.cli import progress as display
from erasekit.events import Progressed, RunFinished, StageStarted, StepEnd, heard, progress
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.runner import run


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def test_nobody_need_listen():
    progress("encoding", 1, 2)


def test_begin_and_end_are_always_told_and_what_is_between_at_most_once_a_second():
    told = []
    with heard(told.append):
        for done in range(1001):
            progress("encoding", done, 1000)
    progress("encoding", 0, 1)
    assert told[0] == Progressed("encoding", 0, 1000)
    assert told[-1] == Progressed("encoding", 1000, 1000)
    assert len(told) < 10


def test_work_inside_other_work_is_told_to_the_inner_listener():
    outer, inner = [], []
    with heard(outer.append):
        with heard(inner.append):
            progress("a", 0, 1)
        progress("b", 0, 1)
    assert [[e.what for e in told] for told in (outer, inner)] == [["b"], ["a"]]


def test_time_left_counts_from_the_parts_own_beginning(clock, capsys):
    lines = display.Lines()
    lines(StageStarted("erase"))
    clock.now += 100  # loading
    lines(Progressed("trajectories", 0, 40))
    clock.now += 20
    lines(Progressed("trajectories", 10, 40))
    assert "erase: trajectories 10/40  2.0 s each, 60 s left" in capsys.readouterr().err
    clock.now += 60
    lines(Progressed("trajectories", 40, 40))
    lines(StepEnd(1, 101, {"loss": 1.0}))
    clock.now += 11
    lines(StepEnd(23, 101, {"loss": 1.0}))
    assert "erase: steps 23/101  loss 1  2.0 a second, 39 s left" in capsys.readouterr().err


def test_training_that_goes_on_from_a_checkpoint_is_not_credited_with_what_was_done_before(clock, capsys):
    lines = display.Lines()
    lines(StageStarted("erase"))
    lines(StepEnd(1000, 2000, {}))
    clock.now += 20
    lines(StepEnd(1010, 2000, {}))
    assert "2.0 s each, 1980 s left" in capsys.readouterr().err


def test_work_of_the_same_kind_that_begins_again_is_timed_anew(clock):
    pace = display.Pace()
    pace.begins("trajectories", 0)
    clock.now += 100
    pace.begins("trajectories", 10)
    assert pace.begins("trajectories", 0)
    clock.now += 5
    pace.begins("trajectories", 5)
    assert pace.told(5, 10) == "1.0 s each, 5 s left  "


def test_bars_show_each_part_once(clock):
    bars = display.Bars()
    parts = [Progressed("encoding", k, 2) for k in (0, 1, 2)]
    steps = [StepEnd(k, 2, {"loss": 1.0}) for k in (1, 2)]
    load, erase, save = (StageStarted(name) for name in ("load", "erase", "save"))
    for event in (load, erase, *parts, *parts, *steps, save, RunFinished(Path())):
        bars(event)
        clock.now += 1
    tasks = bars._progress.tasks
    assert [t.description for t in tasks] == ["load", "erase: encoding", "erase: steps", "save"]
    assert all(t.finished for t in tasks)


def test_a_run_tells_encoding_trajectories_and_writing(tmp_path, tiny_folder, world):
    told = []
    flags = {"method": "esd", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
    overrides = [f"backbone.path={tiny_folder}", "backbone.device=cpu", "method.steps=1", "method.trajectories=5"]
    run(build(flags, overrides=overrides), out=tmp_path, listener=told.append, registries=plugins.load([world]))
    parts = [e for e in told if isinstance(e, Progressed)]
    assert {e.what for e in parts} == {"encoding", "trajectories", "writing"}
    for what in ("encoding", "trajectories", "writing"):
        mine = [(e.done, e.total) for e in parts if e.what == what]
        assert mine[0][0] == 0
        assert mine[-1][0] == mine[-1][1]
