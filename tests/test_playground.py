"""What `erasekit play` shows: one pipeline with its erasures switched, image by image."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from erasekit.cli import main
from erasekit.erasures.manifest import seal
from erasekit.errors import UsageError
from erasekit.evaluation.sampling import generate
from erasekit.runs.playground import Playground

FEW = {"steps": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An erasure of weights, and one that steers."""
    out = tmp_path_factory.mktemp("erasures")
    for method in ("uce", "negative-prompt"):
        what = ["-m", method, "-b", "sd15-mini", "-c", "cat", "-c", "dog", "-s", "protocol.steps=2"]
        assert main(["erase", *what, "--out", str(out / method)]) == 0
    return out / "uce", out / "negative-prompt"


@pytest.fixture(scope="module")
def playground(folders):
    return Playground(folders, protocol=FEW)


def pixels(drawn) -> np.ndarray:
    return np.asarray(drawn.image, dtype=int)


def test_the_base_is_the_unmodified_model(playground):
    backbone = playground.backbone
    backbone.encode(["a cat"])
    (plain,) = generate(backbone, backbone.pipeline(encoders=False), ["a cat"], [3], playground.protocol)
    assert np.array_equal(pixels(playground.draw("a cat", 3)), np.asarray(plain))


@pytest.mark.parametrize("side", [0, 1])
def test_an_erasure_acts_and_leaves_no_trace_in_the_next_image(playground, side):
    base = pixels(playground.draw("a cat", 0))
    erased = pixels(playground.draw("a cat", 0, side))
    assert np.abs(erased - base).max() > 40
    playground._kept.cache_clear()
    assert np.array_equal(pixels(playground.draw("a cat", 0)), base)
    assert np.array_equal(pixels(playground.draw("a cat", 0, side)), erased)


def test_each_concept_has_its_strength(playground):
    assert playground.sides[0].names == ("cat", "dog")
    base = pixels(playground.draw("a cat", 0))
    assert np.array_equal(pixels(playground.draw("a cat", 0, 0, {"cat": 0, "dog": 0})), base)
    only_dog = np.abs(pixels(playground.draw("a cat", 0, 0, {"cat": 0})) - base).mean()
    only_cat = np.abs(pixels(playground.draw("a cat", 0, 0, {"dog": 0})) - base).mean()
    assert only_dog < only_cat / 2
    assert np.array_equal(pixels(playground.draw("a cat", 0, 1, {"all concepts": 0})), base)


def test_an_image_is_drawn_once(playground):
    assert playground.draw("a ship", 1, 0, {"cat": 0.5}) is playground.draw("a ship", 1, 0, {"cat": 0.5})


def test_what_is_refused(playground):
    with pytest.raises(UsageError, match="There is no prompt"):
        playground.draw(" ", 0)
    with pytest.raises(UsageError):
        playground.draw("a nude child", 0)


def test_sexual_prompts_are_blurred_unless_they_are_to_be_seen(playground, folders):
    hidden = playground.draw("a naked man", 0)
    shown = Playground(folders[:1], protocol=FEW, reveal=True).draw("a naked man", 0)
    assert (hidden.blurred, shown.blurred) == (True, False)
    assert pixels(hidden).std() < pixels(shown).std()


def test_erasures_of_two_bases_are_not_shown_beside_each_other(folders, tmp_path):
    other = shutil.copytree(folders[0], tmp_path / "other") / "erasure.json"
    manifest = json.loads(other.read_text().replace("sd15-mini", "flux-mini"))
    manifest["base"]["sha256"] = "0" * 64
    other.write_text(json.dumps(manifest | {"manifest_sha256": seal(manifest)}))
    with pytest.raises(UsageError, match="flux-mini"):
        Playground([folders[0], tmp_path / "other"])


def test_without_gradio_it_says_what_to_install_before_it_loads_anything(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("erasekit.runs.playground.Playground.__init__", None)
    assert main(["play", str(folders[0])]) == 3
    assert "pip install 'erasekit[play]'" in capsys.readouterr().err
