"""Packages that are missing are named all at once, before anything is read, downloaded or loaded."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from erasekit.errors import EnvironmentProblem
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.packages import check_packages
from erasekit.runs.resolve import resolve
from erasekit.runs.runner import run

ROOT = Path(__file__).parents[1]
REGISTRIES = plugins.default()
I2P = {"method": "trace", "backbone": "flux", "task": "i2p"}
TOLD = {
    "datasets": "the prompts of 'i2p'",
    "nudenet": "the evaluator 'nudenet'",
    "open_clip": "the evaluator 'clip-score'",
    "bitsandbytes": "four bits, --vram 24",
}


@pytest.fixture
def missing(monkeypatch):
    """Hide modules, as if they were not installed."""

    def hide(*modules):
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)

    return hide


def test_a_run_names_all_that_is_missing_in_one_line(missing, tmp_path):
    missing(*TOLD)
    config = build(I2P, overrides=["backbone.vram=24", "backbone.device=cpu"])
    with pytest.raises(EnvironmentProblem) as error:
        run(config, out=tmp_path)
    assert "\n" not in str(error.value)
    for module, what in TOLD.items():
        assert f"{module} (for {what})" in str(error.value)
    assert str(error.value).endswith("Run: pip install 'erasekit[clip,datasets,nf4,nudenet]'.")


def test_the_command_names_them_too(missing, tmp_path, capsys):
    from erasekit.cli import main

    missing("datasets", "nudenet")
    flags = [f"--{name}={value}" for name, value in I2P.items()]
    for more in ([], ["--dry-run"]):
        assert main(["run", *flags, "--vram", "48", "--out", str(tmp_path / "runs"), *more]) == 3
        said = capsys.readouterr().err
        assert "datasets (for the prompts of 'i2p'), nudenet (for the evaluator 'nudenet')" in said
        assert said.count("pip install") == 1


def test_what_is_not_used_need_not_be_there(missing, tmp_path):
    missing("datasets", "open_clip", "bitsandbytes")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\na statue\n")
    settings = ["task.profile=offline", "backbone.device=cpu"]
    check_packages(resolve(build(I2P, overrides=[*settings, f"task.sets.erase.csv={prompts}"]), REGISTRIES), REGISTRIES)


def test_evaluators_name_every_package_that_they_import():
    classes = [entry.load() for entry in REGISTRIES.evaluators.entries()]
    natural = [kind for kind in classes if ".natural." in kind.__module__]
    declared = {module for kind in natural for module in kind.packages}
    sources = (ROOT / "erasekit" / "evaluation" / "natural").glob("*.py")
    imported = {m for source in sources for m in re.findall(r'package\w*\(\s*f?"(\w+)', source.read_text())}
    assert imported - {"torchmetrics"} <= declared  # erasekit needs that one itself


def test_what_installs_them_is_an_extra_that_there_is():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    classes = [entry.load() for entry in REGISTRIES.evaluators.entries()]
    for requirement in {r for kind in classes for r in kind.packages.values()} | {"erasekit[datasets]", "erasekit[nf4]"}:
        assert re.fullmatch(r"erasekit\[([\w-]+)\]", requirement)[1] in extras
