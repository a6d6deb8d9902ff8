"""Wrong input by every door: one line, the right exit code, nothing that should not have happened, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import typing
from pathlib import Path

import pytest
import torch

from erasekit.cli import main
from erasekit.concepts import Concept
from erasekit.erasures.deltas import LowRank
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.manifest import seal
from erasekit.errors import ErasekitError
from erasekit.evaluation.results import write_result
from erasekit.evaluation.tasks import Protocol
from erasekit.registration.plugins import default
from erasekit.testing import tiny
from tests.test_results import result

USAGE, ENVIRONMENT, FAILED = 2, 3, 4


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """The command line in this process, in an empty folder: (exit code, the lines on stderr)."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments):
        code = main([*map(str, arguments)])
        return code, [line for line in capsys.readouterr().err.splitlines() if line.strip()]

    return called


def refused(code, lines, expected, *, of=""):
    """One line with the right exit code."""
    assert code in expected, (of, code, lines)
    assert len(lines) == 1, (of, lines)
    assert "should not have happened" not in lines[0]
    assert "Traceback" not in lines[0]


# --- the command line

LONG = "x" * 5000
PLACES = ["/dev/null/x", "/proc/x", "x" * 300, "a/" * 3000, "there.txt", "there.txt/x", "loop/x", "s3://bucket/x", "memory://x"]
WORDS = {
    "no command": ["nope"],
    "no flag": ["run", "--nope"],
    "an argument too many": ["run", "x"],
    "a flag without its value": ["run", "--method"],
    "method": ["run", "-m", "nope", "--dry-run"],
    "empty method": ["run", "-m", " ", "--dry-run"],
    "method of control characters": ["run", "-m", "\x1b[31m", "--dry-run"],
    "long method": ["run", "-m", LONG, "--dry-run"],
    "backbone": ["run", "-b", "nope", "--dry-run"],
    "task": ["run", "-t", "nope", "--dry-run"],
    "task file that is not there": ["run", "-t", "nope.toml", "--dry-run"],
    "task file that is a folder": ["run", "-t", "folder.toml", "--dry-run"],
    "preset": ["run", "--preset", "nope", "--dry-run"],
    "kind": ["run", "--kind", "nope", "--dry-run"],
    "files": ["run", "--files", "float8", "--dry-run"],
    "seed below 0": ["run", "--seed", "-1", "--dry-run"],
    "seed of words": ["run", "--seed", "one", "--dry-run"],
    "seed of a fraction": ["run", "--seed", "1.5", "--dry-run"],
    "seed beyond all": ["run", "--seed", str(2**80), "--dry-run"],
    "limit 0": ["run", "--limit", "0", "--dry-run"],
    "limit below 0": ["run", "--limit", "-3", "--dry-run"],
    "vram": ["run", "--vram", "7", "--dry-run"],
    "vram of words": ["run", "--vram", "lots", "--dry-run"],
    "config that is not there": ["run", "--config", "nope.toml"],
    "config that is a folder": ["run", "--config", "."],
    "plugin that is not there": ["run", "--plugin", "nope.py"],
    "plugin that is a folder": ["ls", "--plugin", "."],
    "attack": ["run", "--attack", "nope", "--dry-run"],
    "tracker": ["run", "--tracker", "nope", "--dry-run"],
    "concept of nothing": ["run", "-c", "", "--dry-run"],
    "concept of spaces": ["run", "-c", "   ", "--dry-run"],
    "concept of a colon": ["run", "-c", ":", "--dry-run"],
    "concept without a name": ["run", "-c", ":kitty", "--dry-run"],
    "concept of control characters": ["run", "-c", "ca\x1bt", "--dry-run"],
    "concept of two lines": ["run", "-c", "cat\ndog", "--dry-run"],
    "concept that turns the text round": ["run", "-c", "cat\u202e", "--dry-run"],
    "concept twice": ["run", "-c", "cat", "-c", "cat", "--dry-run"],
    "concept that nobody knows": ["run", "-c", "zebra", "--dry-run"],
    "set without a value": ["run", "-s", "method.steps", "--dry-run"],
    "set without a part": ["run", "-s", "steps=1", "--dry-run"],
    "set of nothing": ["run", "-s", "", "--dry-run"],
    "set of an equals sign": ["run", "-s", "=", "--dry-run"],
    "set of dots": ["run", "-s", "..=1", "--dry-run"],
    "set of no part": ["run", "-s", "nope.x=1", "--dry-run"],
    "set against itself": ["run", "-s", "method.steps=1", "-s", "method.steps.x=1", "--dry-run"],
    "generate with concept alone": ["generate", "a cat", "-c", "cat"],
    "generate with strength alone": ["generate", "a cat", "--strength", "0.5"],
    "generate nothing": ["generate"],
    "generate none": ["generate", "a cat", "--n", "0"],
    "generate beyond all": ["generate", "a cat", "--n", "10000000000"],
    "generate seed": ["generate", "a cat", "--seed", "-1"],
    "generate last seed": ["generate", "a cat", "--seed", str(2**63 - 1), "--n", "2"],
    "generate backbone": ["generate", "a cat", "-b", "nope"],
    "generate settings of a method": ["generate", "a cat", "-s", "method.steps=1"],
    "generate sampler of flux": ["generate", "a cat", "-b", "flux-mini", "-s", "protocol.sampler=ddim"],
    "generate odd size": ["generate", "a cat", "-s", "protocol.size=65"],
    "generate no size": ["generate", "a cat", "-s", "protocol.size=0"],
    "generate bytes that are no text": ["generate", "a cat", "a \udcff dog"],
    "new of a long name": ["new", "method", "x" * 300],
    "generate refused words": ["generate", "a nude 12 year old"],
    "strength of words": ["generate", "a cat", "-e", "nope", "--strength", "lots"],
    "strength without bound": ["generate", "a cat", "-e", "nope", "--strength", "inf"],
    "strength that is no number": ["generate", "a cat", "-e", "nope", "--strength", "nan"],
    "strength of all and one": ["generate", "a cat", "-e", "nope", "--strength", "1", "--strength", "cat=1"],
    "erase method": ["erase", "-m", "nope"],
    "erase over a file": ["erase", "--out", "there.txt"],
    "erase over a file by force": ["erase", "--out", "there.txt", "--force"],
    "erase over a folder by force": ["erase", "--out", "theirs", "--force"],
    "evaluate": ["evaluate", "nope"],
    "evaluate a folder of others": ["evaluate", "theirs"],
    "evaluate a method's settings": ["evaluate", "nope", "-s", "method.steps=1"],
    "attack without attack": ["attack", "nope"],
    "attack nothing": ["attack", "nope", "--attack", "unlearndiff"],
    "verify": ["verify", "nope"],
    "verify a file": ["verify", "there.txt"],
    "verify a folder of others": ["verify", "theirs"],
    "verify a link in a circle": ["verify", "loop"],
    "strength of a run that is not there": ["strength", "nope"],
    "strength limit": ["strength", "nope", "--limit", "0"],
    "export": ["export", "nope"],
    "export form": ["export", "nope", "--to", "nope"],
    "export rank": ["export", "nope", "--rank", "0"],
    "merge nothing": ["merge"],
    "merge two that are not there": ["merge", "nope", "nope2"],
    "merge into itself": ["merge", "nope", "nope2", "--out", "nope", "--force"],
    "merge over a folder by force": ["merge", "nope", "nope2", "--out", "theirs", "--force"],
    "merge images": ["merge", "nope", "nope2", "--images", "-1"],
    "report nothing": ["report"],
    "report": ["report", "nope"],
    "report a file": ["report", "there.txt"],
    "report one page of one": ["report", "nope", "--page"],
    "sweep": ["sweep", "nope.toml"],
    "sweep a folder": ["sweep", "."],
    "sweep a file that is no TOML": ["sweep", "there.txt"],
    "ablate": ["ablate", "nope"],
    "ls": ["ls", "nope"],
    "where": ["where", "nope"],
    "plugins": ["plugins", "nope"],
    "push": ["push", "nope", "me/mine", "--yes"],
    "play": ["play", "nope"],
}
CLI = WORDS | {f"{name} into {place[:12]} {i}": [*words, "--out", place] for i, place in enumerate(PLACES) for name, words in {
    "run": ["run", "-c", "cat"],
    "erase": ["erase", "-c", "cat"],
    "generate": ["generate", "a cat"],
}.items()}  # fmt: skip


@pytest.mark.parametrize("arguments", CLI.values(), ids=CLI)
def test_the_command_line(call, tmp_path, arguments):
    (tmp_path / "there.txt").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("theirs")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    before = {path.name for path in tmp_path.iterdir()}
    refused(*call(*arguments), (USAGE, ENVIRONMENT))
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "there.txt").read_text() == "mine"
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == "theirs"


@pytest.mark.parametrize("command", [["run", "--dry-run"], ["erase"]], ids=["run", "erase"])
def test_words_that_are_refused(call, tmp_path, command):
    """Each place where they stand is a line."""
    code, lines = call(command[0], "-b", "sd15", "-c", "nude 12 year old", *command[1:])
    assert code == USAGE
    assert lines
    assert all("erasekit refuses" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [["generate", "{}"], ["erase", "-c", "{}"], ["run", "-c", "{}"]], ids=["generate", "erase", "run"]
)
def test_words_are_refused_before_a_model_is_looked_for(call, command):
    """The encoder would refuse them too: by then a model would have been loaded."""
    words = [word.format("nude 12 year old") for word in command]
    code, lines = call(*words, "-b", "sd15", "-s", "backbone.path=/there/is/none")
    assert code == USAGE
    assert lines
    assert all("refuses" in line for line in lines), lines


@pytest.mark.parametrize("command", [["run", "-c", "cat"], ["erase", "-c", "cat"], ["generate", "a cat"], ["merge", "a", "b"]])
def test_a_name_that_is_too_long_is_wrong_usage(call, tmp_path, command):
    code, lines = call(*command, "--out", "x" * 300)
    refused(code, lines, (USAGE,))
    assert "bytes. Choose another place with --out." in lines[0]
    assert list(tmp_path.iterdir()) == []


# --- settings: every one of every method, backbone, protocol, evaluator and attack


def settings():
    """For each part and each kind of wrong value, the settings that cannot take it."""
    registries = default()
    for entry in registries.methods.entries():
        yield from _wrong(entry.load().Config, "method", ["-m", entry.name])
    yield from _wrong(registries.backbones.get("sd15-mini").Config, "backbone", [])
    yield from _wrong(Protocol, "protocol", [])
    for entry in registries.attacks.entries():
        yield from _wrong(entry.load().Config, f"attacks.{entry.name}", ["--attack", entry.name])


def _wrong(model, part, flags):
    found = {}
    for name, field in model.model_fields.items():
        for value in _refused_by({field.annotation, *typing.get_args(field.annotation)}):
            found.setdefault(value, []).append(f"{part}.{name}={value}")
    for value, given in found.items():
        yield f"{part} {' '.join(flags)} {value}", (flags, given)


def _refused_by(kinds):
    yield "{a = {b = 1}}"
    if kinds & {int, float}:
        yield from ("inf", "nan", "1e300", "[[1]]")
        if str not in kinds:
            yield "words"
    elif bool in kinds or not kinds & {str, tuple[str, ...]}:
        yield from ("7.5", "no such words")


SETTINGS = dict(settings())


@pytest.mark.parametrize(("flags", "given"), SETTINGS.values(), ids=SETTINGS)
def test_settings(call, tmp_path, flags, given):
    """A line for each."""
    code, lines = call("run", "-c", "cat", *flags, *(word for text in given for word in ("-s", text)), "--dry-run")
    assert code == USAGE, lines
    assert not [line for line in lines if "should not have happened" in line or "Traceback" in line]
    for text in given:
        key = text.partition("=")[0]
        assert len([line for line in lines if f"'{key}" in line]) >= 1, (text, lines)
    keys = [text.partition("=")[0] for text in given]
    assert all(any(f"'{key}" in line for key in keys) for line in lines), lines
    assert list(tmp_path.iterdir()) == []


# --- config files

CONFIGS = {
    "no TOML": "= 1",
    "cut": 'method = "tra',
    "a key twice": 'method = "uce"\nmethod = "esd"',
    "deep": "a = " + "[" * 5000,
    "deep and closed": "a = " + "[" * 3000 + "]" * 3000,
    "a null byte": "method = '\0'",
    "unknown key": "nope = 1",
    "unknown table": "[nope]\nx = 1",
    "unknown option": "[options.nope]\nx = 1",
    "method of a number": "method = 1",
    "method of a list": "method = ['uce']",
    "method of a table": "[method]\nx = 1",
    "backbone of a number": "backbone = 1",
    "task of a date": "task = 2020-01-01",
    "concepts of words": "concepts = 'cat'",
    "concepts of numbers": "concepts = [1]",
    "concepts of lists": "concepts = [['cat']]",
    "seed of words": "seed = 'one'",
    "seed of nan": "seed = nan",
    "seed of inf": "seed = inf",
    "seed of a truth": "seed = 'true'",
    "seed below": "seed = -1",
    "seed beyond": f"seed = {10**30}",
    "limit": "limit = 0",
    "options of words": "options = 'x'",
    "options of a list": "options = [1]",
    "method settings of words": "[options]\nmethod = 'x'",
    "protocol settings of words": "[options]\nprotocol = 1",
    "evaluator settings of words": "[options]\nevaluators = 'x'",
    "evaluator that is not there": "[options.evaluators.nope]\nx = 1",
    "settings of an evaluator of words": "[options.evaluators]\nmini-classifier = 3",
    "attacks of words": "attacks = 'x'",
    "attack settings without the attack": "[options.attacks.nope]\nx = 1",
    "files": "files = 'float8'",
    "kind": "kind = 'nope'",
    "neutral of a number": "neutral = 3",
    "preserve of a number": "preserve = 3",
    "keep_texts of words": "keep_texts = 'maybe'",
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("command", [["run", "--dry-run"], ["erase"]], ids=["run", "erase"])
def test_config_files(call, tmp_path, text, command):
    (tmp_path / "c.toml").write_text(text)
    refused(*call(command[0], "--config", "c.toml", *command[1:]), (USAGE,))
    assert [path.name for path in tmp_path.iterdir()] == ["c.toml"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"method = '\xe9'"], ids=["utf-16", "latin-1"])
def test_config_files_of_other_encodings(call, tmp_path, content):
    (tmp_path / "c.toml").write_bytes(content)
    refused(*call("run", "--config", "c.toml", "--dry-run"), (USAGE,))


# --- plugin files

HOOK = "import erasekit\n\n@erasekit.hookimpl\ndef register_methods(register):\n    "
PLUGINS = {
    "no Python": "def",
    "a null byte": "x = '\0'",
    "no hook": "x = 1",
    "raises": "raise RuntimeError('two\\nlines')",
    "raises words that steer the terminal": "raise RuntimeError('\\x1b[31mred')",
    "exits": "import sys; sys.exit(0)",
    "exits with words": "raise SystemExit('bye')",
    "imports what is not there": "import nope_nope",
    "misspelt hook": "import erasekit\n\n@erasekit.hookimpl\ndef register_method(register): ...",
    "wrong argument": "import erasekit\n\n@erasekit.hookimpl\ndef register_methods(nope): ...",
    "exits in its hook": HOOK + "raise SystemExit(0)",
    "raises in its hook": HOOK + "1 / 0",
    "name of a number": HOOK + "register(1, 'a:B')",
    "name of nothing": HOOK + "register('', 'a:B')",
    "name of two lines": HOOK + "register('a\\nb', 'a:B')",
    "name of None": HOOK + "register(None, 'a:B')",
    "target of a number": HOOK + "register('x', 3)",
    "target of None": HOOK + "register('x', None)",
    "target without a colon": HOOK + "register('x', 'module')",
    "aliases of a number": HOOK + "register('x', 'a:B', aliases=3)",
    "aliases of numbers": HOOK + "register('x', 'a:B', aliases=(3,))",
    "summary of a number": HOOK + "register('x', 'a:B', summary=3)",
    "paper of a list": HOOK + "register('x', 'a:B', paper=[1])",
    "a name that is taken": HOOK + "register('uce', 'a:B')",
    "an alias that is taken": HOOK + "register('x', 'a:B', aliases=('uce',))",
    "no such keyword": HOOK + "register('x', 'a:B', nope=1)",
    "a class of another name": HOOK + "register('x', type('Y', (), {'name': 'y'}))",
}


@pytest.mark.parametrize("text", PLUGINS.values(), ids=PLUGINS)
def test_plugin_files(call, tmp_path, text):
    """A broken plugin is a line, and all else works."""
    path = tmp_path / "stranger_plugin.py"
    path.write_text(text)
    code, lines = call("ls", "methods", "--plugin", path)
    refused(code, lines, (0,))
    assert "stranger_plugin" in lines[0]
    assert "broken" in lines[0]


LAZY = {
    "exits": "import sys; sys.exit(0)",
    "raises": "raise RuntimeError('two\\nlines')",
    "no such name": "x = 1",
    "no Python": "def",
    "no class": "Mine = 3",
    "another name": "class Mine:\n    name = 'other'",
}


@pytest.mark.parametrize("text", LAZY.values(), ids=LAZY)
def test_what_a_plugin_registers_lazily(call, tmp_path, monkeypatch, text):
    """Choosing it shows its traceback, then the line."""
    monkeypatch.syspath_prepend(tmp_path)
    module = f"lazy_{abs(hash(text))}"
    (tmp_path / f"{module}.py").write_text(text)
    (tmp_path / "lazy_plugin.py").write_text(HOOK + f"register('mine', '{module}:Mine')")
    code, lines = call("run", "-m", "mine", "--plugin", tmp_path / "lazy_plugin.py", "--dry-run")
    refused(code, lines[-1:], (ENVIRONMENT, USAGE), of=lines)


# --- erasures of strangers


@pytest.fixture(scope="module")
def honest(tiny_folder, tmp_path_factory):
    """An erasure of one concept, and what is exported from it."""
    backbone = tiny.load(tiny_folder)
    generator, modules = torch.Generator().manual_seed(0), dict(backbone.denoiser.named_modules())
    shapes = {name: modules[name].weight.shape for name in backbone.lora_targets("kv")[:1]}
    deltas = {
        name: LowRank(torch.randn((out, 1), generator=generator), torch.randn((1, width), generator=generator))
        for name, (out, width) in shapes.items()
    }
    folder = tmp_path_factory.mktemp("honest") / "e"
    concepts = (Concept.parse("cat:kitten"),)
    Erasure.of(backbone, concepts, method="made-up", config={"rank": 1}, deltas={"cat": {"refine": deltas}}).save(folder)
    return folder


KEYS = (
    "schema_version",
    "kind",
    "base",
    "backbone",
    "denoiser",
    "method",
    "config",
    "config_hash",
    "concepts",
    "residual",
    "drift",
    "figures",
    "warnings",
    "parts",
    "ranks",
    "dtype",
    "rounding",
    "files",
    "erasure_sha256",
    "environment",
    "created",
    "manifest_sha256",
    "base.repo",
    "base.revision",
    "base.sha256",
    "base.modules",
)
GONE = object()
VALUES = {
    "gone": GONE,
    "null": None,
    "number": 7,
    "nan": float("nan"),
    "words": "no\nwords",
    "list": [[1]],
    "table": {"../x": {"": 1}},
}


@pytest.mark.parametrize("key", KEYS)
def test_manifests(call, world, honest, tmp_path, key):
    """Whatever a key of a manifest is made: refused, also with all hashes made again, or the honest weights come out."""
    folder, want = Path(shutil.copytree(honest, tmp_path / "e")), Erasure.load(honest).total()
    for kind, value in VALUES.items():
        manifest = json.loads((honest / "erasure.json").read_text())
        place, _, last = key.rpartition(".")
        table = manifest[place] if place else manifest
        if value is not GONE and table[last] == value:
            continue
        table.pop(last) if value is GONE else table.update({last: value})
        (folder / "erasure.json").write_text(json.dumps(manifest))
        with pytest.raises(ErasekitError) as error:
            Erasure.load(folder)
        refused(error.value.exit_code, str(error.value).splitlines(), (USAGE, ENVIRONMENT), of=(key, kind))
        if key == "manifest_sha256":
            continue
        manifest["manifest_sha256"] = seal(manifest)
        (folder / "erasure.json").write_text(json.dumps(manifest))
        code, lines = call("export", folder, "--out", tmp_path / "out", "--force", "--plugin", world)
        if code:
            refused(code, lines, (USAGE, ENVIRONMENT), of=(key, kind))
        else:
            got = Erasure.load(folder).total()
            assert all(torch.equal(want[name].up @ want[name].down, got[name].up @ got[name].down) for name in want)


@pytest.mark.parametrize("setting", ["method.steps=1", "method.rank=2", "method.nope=1"])
def test_settings_of_the_method_are_those_that_an_erasure_was_made_with(call, world, honest, tmp_path, setting):
    """Measured with others, its record would say what it was not made with."""
    code, lines = call("evaluate", honest, "-t", "words", "-s", setting, "--plugin", world)
    refused(code, lines, (USAGE,))
    assert "keeps the settings that it was made with" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == []


# --- folders of runs

RESULTS = (
    "schema_version",
    "method",
    "backbone",
    "task",
    "domain",
    "concepts",
    "seed",
    "config_hash",
    "protocol",
    "counts",
    "metrics",
    "timings_s",
    "peak_memory_mb",
    "erasure_sha256",
)


@pytest.mark.parametrize("key", RESULTS)
def test_results(call, tmp_path, key):
    write_result(result(), tmp_path / "results.json")
    whole = json.loads((tmp_path / "results.json").read_text())
    for kind, value in VALUES.items():
        changed = {k: v for k, v in whole.items() if k != key} | ({} if value is GONE else {key: value})
        (tmp_path / "results.json").write_text(json.dumps(changed))
        code, lines = call("report", tmp_path)
        if code:
            refused(code, lines, (USAGE, ENVIRONMENT), of=(key, kind))
        else:
            assert not [line for line in lines if "should not have happened" in line], (key, kind)


TEXTS = {
    "empty": b"",
    "null byte": b"\0",
    "cut": b'{"schema_version": 1, "me',
    "a list": b"[]",
    "a number": b"1",
    "no UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a key twice": b'{"method": "a", "method": "b"}',
}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["erasure.json", "results.json"])
def test_files_that_are_no_json(call, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for words in (["verify"], ["evaluate"], ["export"]) if name == "erasure.json" else (["report"], ["strength"]):
        refused(*call(*words, tmp_path), (USAGE, ENVIRONMENT), of=words)


def test_there_are_at_least_400_kinds():
    kinds = len(CLI) + sum(len(given) for _, given in SETTINGS.values()) + 2 * len(CONFIGS) + len(PLUGINS) + len(LAZY)
    kinds += len(VALUES) * (2 * len(KEYS) + len(RESULTS)) + 5 * len(TEXTS)
    assert kinds >= 400
