"""How long a run will take: from earlier runs, from its own pace, and nothing that nobody knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasekit.events import Progressed, RunFinished, RunStarted, Sampled, StageStarted, StepEnd
from erasekit.runs import forecast as module
from erasekit.runs.forecast import STAGES, Forecast

STARTED = RunStarted("m", "b", "t", ("cat",), "0", resumed=False)


class Clock:
    def __init__(self):
        self.now = 50.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_nothing_is_said_before_anything_is_known(clock):
    told = Forecast(images=10)
    assert told.left() is None
    told(STARTED)
    told(StageStarted("load"))
    assert told.left() is None


def test_earlier_runs_say_it_from_the_start(clock):
    told = Forecast(images=10, image_s=0.5, stage_s={"load": 1.0, "erase": 30.0, "evaluate": 2.0})
    assert told.left() == 10 * 0.5 * 2 + 33
    told(STARTED)
    told(StageStarted("load"))
    clock.now += 0.4
    assert told.left() == pytest.approx(42.6)
    told(StageStarted("base_images"))
    assert told.left() == pytest.approx(42)


def test_without_any_the_first_images_say_it(clock):
    told = Forecast(images=10, erase_rows=300, image_rows=30)
    told(STARTED)
    told(StageStarted("base_images"))
    told(Sampled("base", 0, 10))
    clock.now += 4
    told(Sampled("base", 2, 10))
    assert told.left() == pytest.approx(8 * 2 + 300 * 2 / 30 + 20)
    clock.now += 16
    told(Sampled("base", 10, 10))
    told(StageStarted("erase"))
    assert told.left() == pytest.approx(300 * 2 / 30 + 20)
    clock.now += 5
    assert told.left() == pytest.approx(15 + 20)


def test_the_steps_of_the_first_call_say_it_already(clock):
    told = Forecast(images=10, erase_rows=300, image_rows=30)
    told(STARTED)
    told(StageStarted("base_images"))
    clock.now += 3  # the pipeline is made
    told(Progressed("images", 4, 10))  # four were there
    assert told.left() is None
    clock.now += 2
    told(Progressed("images", 5, 10))
    assert told.left() == pytest.approx(5 * 2 + 300 * 2 / 30 + 20)


def test_training_is_told_by_its_own_pace(clock):
    told = Forecast(images=10, image_s=1.0, stage_s={"erase": 1.0})
    told(STARTED)
    told(StageStarted("erase"))
    told(Progressed("trajectories", 0, 10))
    clock.now += 20
    told(Progressed("trajectories", 5, 10))
    assert told.left() == pytest.approx(20 + 10)
    told(StepEnd(1, 101, {}))
    clock.now += 10
    told(StepEnd(21, 101, {}))
    assert told.left() == pytest.approx(40 + 10)


def test_images_that_were_there_already_say_nothing(clock):
    told = Forecast(images=100, image_s=1.0, stage_s={"erase": 0.0})
    told(STARTED)
    told(StageStarted("base_images"))
    clock.now += 0.1
    told(Sampled("base", 100, 100))
    told(StageStarted("erase"))
    assert told.left() == pytest.approx(100)


def test_of_images_that_were_there_in_part_only_the_others_say_something(clock):
    told = Forecast(images=100, stage_s={"erase": 0.0})
    told(STARTED)
    told(StageStarted("base_images"))
    told(Sampled("base", 90, 100))
    clock.now += 5
    told(Sampled("base", 95, 100))
    assert told.left() == pytest.approx(5 + 100)
    clock.now += 5
    told(Sampled("base", 100, 100))
    told(StageStarted("erase"))
    assert told.left() == pytest.approx(100)


def test_an_erasure_that_was_taken_from_another_run_says_nothing_of_the_next(clock):
    told = Forecast(images=10, image_s=1.0, stage_s={"erase": 500.0}, runs=2)
    for event in (STARTED, StageStarted("erase"), StageStarted("certify")):
        told(event)
        clock.now += 1
    assert told.stage_s["erase"] == 500
    for event in (StageStarted("erase"), StepEnd(1, 1, {}), StageStarted("certify")):
        told(event)
        clock.now += 1
    assert told.stage_s["erase"] == 2


def test_several_runs_are_counted_and_their_own_time_is_learnt(clock):
    told = Forecast(images=10, image_s=1.0, stage_s={"erase": 10.0}, runs=3)
    assert told.left() == pytest.approx(3 * 30)
    told(STARTED)
    for stage in STAGES:
        told(StageStarted(stage))
        clock.now += 10
    told(RunFinished(Path()))
    told(STARTED)
    told(StageStarted("report"))
    clock.now += 5
    assert told.left() == pytest.approx(5 + 10 * len(STAGES))  # as the run before took, less what this stage has had
    told(RunFinished(Path()))
    told(RunFinished(Path()))
    assert told.left() == 0
