"""What a notebook shows of results and erasures."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from erasekit.erasures.erasure import Erasure
from erasekit.evaluation.results import read_result
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run


class Balanced(HTMLParser):
    """Sees that what is opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def finished(world, tiny_folder, tmp_path_factory):
    registries, out = plugins.load([world]), tmp_path_factory.mktemp("runs")
    names = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat:a <b>cat</b>",)}
    config = build(names, overrides=[f"backbone.path={tiny_folder}", "backbone.device=cpu", "method.steps=1"])
    return run(config, out=out, registries=registries), path_of(out, resolve(config, registries))


def pictures(html: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]


def test_a_result_shows_its_numbers_and_images(finished):
    result, path = finished
    html = result._repr_html_()
    Balanced(html)
    assert "cat, erased from tiny by pull (words)" in html
    assert all(f"<td>{name}</td>" in html for name in result.metrics)
    files = sorted((path / "samples").glob("*.png"))
    assert sorted(image.size for image in pictures(html)) == sorted(Image.open(file).size for file in files)
    assert len(files) > 0
    assert html.index("erase: base left") < html.index("preserve: base left")
    assert read_result(path / "results.json")._repr_html_() == html


def test_results_are_equal_wherever_they_lie(finished, tmp_path):
    result, path = finished
    (tmp_path / "results.json").write_text((path / "results.json").read_text())
    other = read_result(tmp_path / "results.json")
    assert other == result
    assert pictures(other._repr_html_()) == []
    assert other.model_copy(update={"seed": 7}) != result


def test_an_erasure_shows_what_it_erases_what_it_leaves_and_the_images_of_its_run(finished, tmp_path):
    _, path = finished
    erasure = Erasure.load(path / "erasure")
    html = erasure._repr_html_()
    Balanced(html)
    assert "<td>cat</td>" in html
    assert "a &lt;b&gt;cat&lt;/b&gt;" in html
    assert "residual" in html
    assert len(pictures(html)) == len(list((path / "samples").glob("*.png")))
    erasure.save(tmp_path / "elsewhere")
    assert pictures(Erasure.load(tmp_path / "elsewhere")._repr_html_()) == []
