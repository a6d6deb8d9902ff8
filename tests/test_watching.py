"""Images drawn while a method trains: beside the base's, now and then, and without a trace in what is trained."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from erasekit.events import Watched
from erasekit.registration import plugins
from erasekit.runs import watching
from erasekit.runs.config import build
from erasekit.runs.pages.training import events, film
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run


@pytest.fixture(scope="module")
def registries(world):
    return plugins.load([world])


@pytest.fixture(scope="module")
def done(tmp_path_factory, registries, tiny_folder):
    """Run something in the tiny world: (result, its directory, the events about images)."""

    def runs(*overrides, out=None, concepts=("cat",), **flags):
        names = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": concepts, **flags}
        config = build(names, overrides=[f"backbone.path={tiny_folder}", "backbone.device=cpu", *overrides])
        out, told = out or tmp_path_factory.mktemp("runs"), []
        result = run(config, out=out, registries=registries, listener=told.append)
        return result, path_of(out, resolve(config, registries)), [e for e in told if isinstance(e, Watched)]

    return runs


@pytest.fixture(scope="module")
def watched(done):
    return done()


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_a_small_model_is_watched_five_times(watched):
    _, path, told = watched
    assert [e.step for e in told] == [0, 3, 6, 9, 12]
    assert [e.file for e in told] == [f"step-{e.step}.webp" for e in told]
    assert told[0].prompts == ("a photo of a cat", "a photo of a ship")
    assert not told[0].blurred
    for event in told:
        assert pixels(path / "samples" / event.file).shape == (2 * 16 + 2, 2 * 16 + 2, 3)


def test_the_upper_row_is_the_base_and_the_lower_one_leaves_it(done, monkeypatch):
    rows = []
    monkeypatch.setattr(watching, "_save", lambda sheet, path: rows.append([np.stack(row).astype(int) for row in sheet]))
    done("method.lr=0.05")
    (base, first), *_, (same, last) = rows
    assert np.array_equal(base, first)  # an untrained LoRA changes nothing
    assert np.array_equal(base, same)
    assert not np.array_equal(base, last)


def test_what_is_trained_is_the_same_with_it_and_without(watched, done):
    result, _, told = watched
    without, path, none = done(sample_every=0)
    assert told
    assert none == []
    assert not list((path / "samples").glob("step-*"))
    assert without.erasure_sha256 == result.erasure_sha256
    assert without.config_hash == result.config_hash
    assert without.metrics == result.metrics


def test_the_global_generator_is_left_alone(watched, done, monkeypatch):
    seen = []
    monkeypatch.setattr(watching.Watch, "_draw", drawn(watching.Watch._draw, seen))
    done(sample_every=4)
    assert len(seen) == 5
    assert all(before == after for before, after in seen)


def drawn(draw, seen):
    def recorded(self, predict):
        before = torch.random.get_rng_state().sum().item()
        images = draw(self, predict)
        seen.append((before, torch.random.get_rng_state().sum().item()))
        return images

    return recorded


def test_it_is_drawn_as_often_as_is_asked_for(done):
    _, _, told = done(sample_every=5)
    assert [e.step for e in told] == [0, 5, 10, 12]


def test_steps_of_several_trainings_count_on(done):
    _, _, told = done(
        *("method.form=multi", "method.steps=4", "method.trajectories=2", "method.batch=2"),
        method="ant",
        concepts=("cat", "dog"),
        sample_every=2,
    )
    assert [e.step for e in told] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(("method", "setting"), [("esd", "weights=full"), ("ant", "form=single")])
def test_weights_that_take_the_bases_place_only_in_a_prediction_are_what_is_drawn(done, method, setting):
    few = ("method.steps=4", "method.trajectories=2", "method.lr=0.01")
    _, path, told = done(f"method.{setting}", *few, method=method)
    first, *_, last = (pixels(path / "samples" / e.file) for e in told)
    assert np.abs(last[18:] - last[:16]).mean() > np.abs(first[18:] - first[:16]).mean() + 1


def test_a_closed_form_has_nothing_to_watch(done):
    _, path, told = done(method="uce")
    assert told == []
    assert not list((path / "samples").glob("step-*"))


def test_a_large_model_is_watched_only_if_that_is_asked_for(registries, tiny_folder, monkeypatch):
    def wanted(**flags):
        names = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat",), **flags}
        return watching.wanted(resolve(build(names, overrides=[f"backbone.path={tiny_folder}"]), registries))

    assert wanted()
    assert not wanted(sample_every=0)
    monkeypatch.setattr(watching, "LARGE_GB", 0.0)
    assert not wanted()
    assert wanted(sample_every=50)


def test_images_of_a_blurred_task_are_blurred_when_they_are_drawn(done, registries, monkeypatch):
    _, path, plain = done(sample_every=12)
    monkeypatch.setattr(registries.tasks.get("words", "mini"), "blurred", True)
    _, hidden, told = done(sample_every=12)
    assert [e.blurred for e in told] == [True, True]
    assert [e.blurred for e in plain] == [False, False]
    sharp, soft = (pixels(folder / "samples" / "step-12.webp")[:16, :16] for folder in (path, hidden))
    assert soft.std() < sharp.std() / 2


def test_the_log_tells_the_page_what_was_drawn(watched):
    _, path, told = watched
    shown = film(path, events(path / "log.jsonl"))
    assert [frame.step for frame in shown] == [e.step for e in told]
    assert shown[0].prompts == "a photo of a cat, a photo of a ship"
    assert 'id="film"' in (path / "report.html").read_text()


def test_drawing_is_not_counted_as_the_methods_time(done, monkeypatch):
    clock = SimpleNamespace(monotonic=iter(range(0, 10_000, 100)).__next__)
    monkeypatch.setattr(watching, "time", clock)
    result, path, told = done(sample_every=12)
    assert len(told) == 2
    assert result.timings_s["erase"] < 0  # three drawings of 100 seconds each, by this clock, were taken off
    assert json.loads((path / "status.json").read_text())["timings_s"]["erase"] == result.timings_s["erase"]


def test_images_of_sexual_prompts_are_blurred_whatever_the_task(done, registries, monkeypatch):
    task = registries.tasks.get("words", "mini")
    usual = task.prompts

    def nude(self, *asked):
        return [prompt._replace(text=prompt.text.replace("a cat", "a nude cat")) for prompt in usual(self, *asked)]

    monkeypatch.setattr(task, "prompts", nude)
    _, _, told = done(sample_every=12)
    assert not task.blurred
    assert [e.blurred for e in told] == [True, True]
