"""What a run says of its progress: every kind of work that may take long, each with a clock of its own."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from erasekit.cli import progress as display
from erasekit.events import Progressed, RunFailed, RunFinished, StageStarted, StepEnd, heard, progress
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.forecast import Forecast
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
    lines(Progressed("trajectories", 0, 70))
    clock.now += 80
    lines(Progressed("trajectories", 40, 70))
    assert "erase: trajectories 40/70, 60 s left, 2.0 s each, " in capsys.readouterr().err
    clock.now += 60
    lines(Progressed("trajectories", 70, 70))
    lines(StepEnd(1, 301, {"loss": 1.0}))
    clock.now += 61
    lines(StepEnd(123, 301, {"loss": 1.0}))
    written = capsys.readouterr().err
    assert "erase: steps 123/301, 89 s left, 2.0/s, " in written
    assert written.rstrip().endswith("; loss 1")


def test_training_that_goes_on_from_a_checkpoint_is_not_credited_with_what_was_done_before(clock, capsys):
    lines = display.Lines()
    lines(StageStarted("erase"))
    lines(StepEnd(1000, 2000, {}))
    clock.now += 100
    lines(StepEnd(1050, 2000, {}))
    assert "32 min left, 2.0 s each" in capsys.readouterr().err


def test_work_of_the_same_kind_that_begins_again_is_timed_anew(clock):
    pace = display.Pace()
    pace.begins("trajectories", 0)
    clock.now += 100
    pace.begins("trajectories", 10)
    assert pace.begins("trajectories", 0)
    clock.now += 5
    pace.begins("trajectories", 5)
    assert pace.told(5, 10) == "5 s left, 1.0 s each, "


def test_a_stage_has_one_line_whatever_it_is_at(clock):
    bars = display.Bars()
    parts = [Progressed("encoding", k, 2) for k in (0, 1, 2)]
    steps = [StepEnd(k, 2, {"loss": 1.0}) for k in (1, 2)]
    load, erase, save = (StageStarted(name) for name in ("load", "erase", "save"))
    for event in (load, erase, *parts, *parts, *steps, save, RunFinished(Path())):
        bars(event)
        clock.now += 1
    tasks = bars._progress.tasks
    assert [t.description for t in tasks] == ["load", "erase", "save"]
    assert all(t.finished for t in tasks)


def test_the_live_line_says_what_it_is_at_its_pace_memory_and_the_whole_run(clock):
    screen = io.StringIO()
    told = Forecast(images=10, image_s=1.0, stage_s={"erase": 30.0})
    with display.Bars(told, Console(file=screen, force_terminal=True, width=160)) as bars:
        bars(StageStarted("erase"))
        bars(StepEnd(1, 101, {"loss": 0.5}))
        clock.now += 10
        bars(StepEnd(21, 101, {"loss": 0.25}))
        (line,) = bars._progress.tasks
        assert line.fields["note"].startswith("steps: 40 s left, 2.0/s, ")
        assert re.search(r"\d [MG]B; loss", line.fields["note"])
        assert "loss 0.25" in line.fields["note"]
        (whole,) = bars._whole.tasks
        assert re.match(r"all in about \d+ s, at \d\d:\d\d", whole.fields["note"])
    assert "whole run" in screen.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_in_a_narrow_terminal_the_note_is_cut_and_nothing_else(clock, width):
    screen = io.StringIO()
    console = Console(file=screen, width=width)
    bars = display.Bars(Forecast(images=10, image_s=1.0, stage_s={"erase": 30.0}), console)
    bars(StageStarted("base_images"))
    bars(Progressed("images", 0, 1000))
    clock.now += 1
    bars(Progressed("images", 120, 1000))
    bars(StageStarted("erase"))
    losses = {"erase": 5.97e-05, "preserve": 8.23e-4, "integration": 1e-9, "something": 1.0}
    for k in (1, 4321):
        bars(StepEnd(k, 10_000, losses))
        clock.now += 1000
    console.print(bars._live.get_renderable())
    first, second, whole = screen.getvalue().splitlines()
    assert all(len(line) <= width for line in (first, second, whole))
    assert re.match(r"base_images ━+ +1000/1000 +0:00:00 [\d.]+ [MG]B", first)
    assert re.match(r"erase       ━+\S* +4321/10000 +0:00:00 steps: .*…$", second)
    assert whole.startswith("whole run ")


def test_elsewhere_a_stage_is_one_line_when_it_ends_and_nothing_in_between(clock, capsys):
    lines = display.Lines()
    with lines:
        lines(StageStarted("load"))
        clock.now += 2
        lines(StageStarted("erase"))
        for k in range(1, 51):
            clock.now += 1
            lines(StepEnd(k, 50, {"loss": 1.0}))
    written = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+ [MG]B", "M", line) for line in written] == ["load: 2 s, M", "erase: steps 50/50, 50 s, M"]


def test_a_stage_that_fails_does_not_look_as_if_it_had_ended(clock, capsys):
    lines = display.Lines()
    lines(StageStarted("load"))
    lines(RunFailed("no weights"))
    lines.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("terminal", "environment", "kind"),
    [
        (True, {}, display.Bars),
        (False, {}, display.Lines),
        (True, {"CI": "true"}, display.Lines),
        (True, {"TERM": "dumb"}, display.Lines),
    ],
)
def test_live_lines_are_for_a_terminal_that_somebody_looks_at(monkeypatch, terminal, environment, kind):
    for name in ("CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(display.sys.stderr, "isatty", lambda: terminal, raising=False)
    assert isinstance(display.listener(), kind)


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5000, "83 min"), (7200, "2.0 h")])
def test_durations_are_said_as_people_say_them(seconds, said):
    assert display.duration(seconds) == said


def test_a_run_tells_encoding_drawing_trajectories_and_writing(tmp_path, tiny_folder, world):
    told = []
    flags = {"method": "esd", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
    overrides = [f"backbone.path={tiny_folder}", "backbone.device=cpu", "method.steps=1", "method.trajectories=5"]
    run(build(flags, overrides=overrides), out=tmp_path, listener=told.append, registries=plugins.load([world]))
    parts = [e for e in told if isinstance(e, Progressed)]
    assert {e.what for e in parts} == {"encoding", "images", "trajectories", "writing"}
    for what in ("encoding", "trajectories", "writing"):
        mine = [(e.done, e.total) for e in parts if e.what == what]
        assert mine[0][0] == 0
        assert mine[-1][0] == mine[-1][1]
