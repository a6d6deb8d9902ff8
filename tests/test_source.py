"""A plugin that was edited is another one, whatever version it says; what comes with erasekit is named as it was."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from erasekit.evaluation.kept_scores import KeptScores
from erasekit.registration import plugins
from erasekit.registration.source import source_digest
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve

THIRD_PARTY = Path(__file__).parent / "third_party"


@pytest.fixture
def loaded(tmp_path):
    """Loads a plugin file with some text added."""
    yield lambda name, text, more="": _written(tmp_path / name, text + more)
    for name in list(sys.modules):
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def _written(path, text):
    path.write_text(text)
    return plugins.load([path])


def hash_of(registries, **flags):
    return resolve(build({"backbone": "sd15-mini", "task": "objects", "concepts": ("cat",), **flags}), registries).hash


def test_an_edited_method_is_a_run_of_its_own(loaded):
    text = (THIRD_PARTY / "single_file_method.py").read_text()
    hashes = [hash_of(loaded("edited_method.py", text, more), method="direction") for more in ("", "# more\n", "")]
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2]
    with_another_plugin = loaded("edited_method.py", text, "# more\n")
    assert hash_of(with_another_plugin, method="uce") == hash_of(plugins.default(), method="uce")


def test_equal_files_elsewhere_are_one_plugin(tmp_path, loaded):
    text = (THIRD_PARTY / "single_file_method.py").read_text()
    first = hash_of(loaded("same_method.py", text), method="direction")
    del sys.modules["same_method"]
    (tmp_path / "elsewhere").mkdir()
    assert hash_of(loaded("elsewhere/same_method.py", text), method="direction") == first


EVALUATOR = """
from erasekit import hookimpl
from erasekit.evaluation.evaluators import Evaluator, Scores

class Edited(Evaluator):
    name, per_image = "edited", True
    def describe(self): return {"model": "none"}
    def update(self, batch): pass
    def compute(self): return Scores([])

@hookimpl
def register_evaluators(register):
    register("edited", Edited)
"""


def test_what_an_edited_evaluator_has_said_is_not_taken_for_what_it_says_now(tmp_path, loaded):
    kept, row = KeptScores(tmp_path / "scores"), {"shown": True}
    kept.add(loaded("edited_evaluator.py", EVALUATOR).evaluators.get("edited")(), {"an image": row})
    assert kept.of(loaded("edited_evaluator.py", EVALUATOR).evaluators.get("edited")()) == {"an image": row}
    assert kept.of(loaded("edited_evaluator.py", EVALUATOR, "# more\n").evaluators.get("edited")()) == {}


def test_what_comes_with_erasekit_has_no_digest():
    for name in ("erasekit.backbones.sd", "erasekit_trace.method", "erasekit_mini.tasks"):
        assert source_digest(name) == ""


def test_a_package_is_hashed_whole_and_one_of_several_distributions_by_its_part(tmp_path, monkeypatch):
    for part in ("one", "two"):
        (tmp_path / "shared" / part).mkdir(parents=True)
        (tmp_path / "shared" / part / "__init__.py").touch()
    (tmp_path / "shared" / "one" / "method.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    one, two = source_digest("shared.one.method"), source_digest("shared.two")
    (tmp_path / "shared" / "one" / "helper.py").write_text("changed = True\n")
    assert source_digest("shared.one.method") != one
    assert source_digest("shared.two") == two
    assert source_digest("there_is_none") == ""
