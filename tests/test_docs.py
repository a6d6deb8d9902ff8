"""The documentation names all there is, and its links lead somewhere."""

import inspect
import re
import runpy
from pathlib import Path

import pytest
import typer

import erasekit
from erasekit import events
from erasekit.attacks.outcomes import MEANINGS
from erasekit.backbones.protocol import BackboneConfig
from erasekit.cli import build
from erasekit.evaluation.metrics import MEASURES
from erasekit.evaluation.results import Metric, RunResult
from erasekit.evaluation.taskfile import ConceptSpec, SetSpec, TaskFile, Templates
from erasekit.evaluation.tasks import PROMPT_SETS, Protocol
from erasekit.registration import hookspecs
from erasekit.registration.plugins import default
from erasekit.registration.scaffold import scaffold
from erasekit.runs import runner
from erasekit.runs.config import Options, RunConfig
from erasekit.sweeps.suite import Suite
from tests.test_architecture import ROOMS, arrows, room

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(build()).commands


def said(name: str) -> bool:
    """Whether the reference has `name` in code."""
    return bool(re.search(rf"`[^`]*(?<![\w-]){re.escape(name)}(?![\w-])[^`]*`", REFERENCE))


@pytest.mark.parametrize("name", sorted(n for n, f in vars(hookspecs).items() if inspect.isfunction(f) and f.__doc__))
def test_hooks(name):
    assert said(name)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_and_flags(name):
    assert said(name)
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        for flag in parameter.opts:
            if flag.startswith("--"):
                assert said(flag), flag
                assert parameter.help, flag


@pytest.mark.parametrize(
    "model", [RunConfig, Options, Suite, BackboneConfig, Protocol, RunResult, Metric], ids=lambda m: m.__name__
)
def test_fields(model):
    for name, field in model.model_fields.items():
        assert said(name), name
        if model not in (RunResult, Metric):
            assert field.description, name


def test_every_metric_stands_in_the_reference_with_the_meaning_that_it_is_defined_with():
    results = REFERENCE.partition("\n## Results\n")[2]
    found = {name: measure.meaning for name, measure in MEASURES.items()} | MEANINGS
    for entry in default().evaluators.entries():
        found |= entry.load().meanings
    for name, meaning in found.items():
        row = re.search(rf"^\| .*`{name}[`\[].*? \| (.+?) \| .+ \|$", results, re.MULTILINE)
        assert row, name
        assert row[1].replace("`", "") == meaning, name


def test_evaluators_and_their_settings():
    for entry in default().evaluators.entries():
        if entry.load().__module__.startswith("erasekit.evaluation.natural"):
            settings = entry.load().Config.model_fields
            rows = [line for line in REFERENCE.splitlines() if line.startswith("|") and f"`{entry.name}`" in line.split("|")[1]]
            text = "\n".join(rows)
            assert len(rows) >= 2, entry.name
            assert [name for name in settings if f"`{name}`" not in text] == [], entry.name
            assert all(field.description for field in settings.values()), entry.name


@pytest.mark.parametrize("name", [entry.name for entry in default().attacks.entries()])
def test_attacks(name):
    assert said(name)


@pytest.mark.parametrize("model", [TaskFile, SetSpec, ConceptSpec, Templates], ids=lambda m: m.__name__)
def test_keys_of_a_tasks_file(model):
    assert all(said(name) for name in model.model_fields)


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_prompt_sets(name):
    assert said(name)


@pytest.mark.parametrize("name", [n for n in erasekit.__all__ if not n.startswith("__")])
def test_public_names(name):
    assert said(name) or said(f"erasekit.{name}")


def test_events():
    names = [n for n, c in vars(events).items() if inspect.isclass(c) and issubclass(c, events.Event) and c is not events.Event]
    assert len(names) == 11
    assert all(said(name) for name in names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_that_are_shown_exist(page):
    for command in re.findall(r"(?:^|`)erasekit ([a-z]\w*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert command in COMMANDS, command


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_that_are_shown_exist(page):
    for path in re.findall(r"`((?:erasekit|plugins|tests|docs|benchmarks)/[\w/.-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_the_tables_are_those_of_the_code():
    written = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]() == written, "run: python docs/generate.py"


def test_the_map_has_the_rooms_and_arrows_of_the_code():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^    (\w+)(?:\[.*?\])? --> (\w+)", page, re.MULTILINE))
    real = {(room(a), room(b)) for a, found in arrows().items() for b in found if room(a) != room(b)}
    assert {end for arrow in drawn for end in arrow} == set(ROOMS)
    assert closure(drawn) == closure(real)
    listed = re.findall(r"^\| .*? \| `erasekit/(\w+)/` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(set(ROOMS) - {"ground"})


def closure(pairs):
    """All pairs that arrows lead from and to, over any number of others."""
    found = set(pairs)
    while more := {(a, d) for a, b in found for c, d in found if b == c} - found:
        found |= more
    return found


def test_the_walk_names_the_functions_of_a_run_in_their_order():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## The walk of a run")[2]
    named = [name for step in re.findall(r"^\d+\. (.*)", page, re.MULTILINE) for name in re.findall(r"`(\w+)` ", step)]
    source = inspect.getsource(runner.run) + inspect.getsource(runner.stages)
    places = [source.index(f"{'planned' if name == 'resolve' else name}(", source.index('"""', 200)) for name in named]
    assert places == sorted(places)
    assert len(places) >= 9


def test_the_method_that_is_explained_is_the_one_that_is_written(tmp_path):
    page = (ROOT / "docs" / "write-a-method.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    (file,) = scaffold("method", "my-method", tmp_path, default(), single_file=True).files
    written = file.read_text(encoding="utf-8")
    assert [line for line in blocks.splitlines() if line.strip()] == [line for line in written.splitlines() if line.strip()]


def test_the_glossary_is_sorted_and_has_one_entry_for_each_word():
    words = re.findall(r"^\*\*(.*?)\.\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert words == sorted(set(words), key=str.lower)
    assert len(words) > 30
