"""`erasekit new`: what it writes passes its own test, as a package and as one file."""

import importlib
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from erasekit.cli import main
from erasekit.registration import plugins
from erasekit.registration.scaffold import KINDS, scaffold
from erasekit.testing import check_task

ROOT = Path(__file__).parents[1]


@pytest.fixture
def new(tmp_path):
    def write(kind, name, **options):
        return scaffold(kind, name, tmp_path, plugins.default(), **options)

    return write


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """What pip does for a package that is written there: its source on the path, its entry points as metadata."""
    imported = set(sys.modules)

    def install(folder):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        metadata = folder / "src" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir()
        head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (metadata / "METADATA").write_text(head, encoding="utf-8")
        points = "".join(f"{name} = {target}\n" for name, target in project["entry-points"]["erasekit"].items())
        (metadata / "entry_points.txt").write_text(f"[erasekit]\n{points}", encoding="utf-8")
        monkeypatch.syspath_prepend(folder / "src")
        importlib.invalidate_caches()

    yield install
    for name in set(sys.modules) - imported:
        if name.startswith("erasekit_my"):
            del sys.modules[name]


def its_tests(file):
    """Run the tests of a file, as pytest does."""
    tests = {name: f for name, f in runpy.run_path(str(file)).items() if name.startswith("test_")}
    assert tests
    for test in tests.values():
        test()


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_passes_its_test(kind, new, installed, tmp_path):
    written = new(kind, f"my-{kind}")
    folder = tmp_path / f"erasekit-my-{kind}"
    assert written.files
    assert all(file.is_file() and file.is_relative_to(folder) for file in written.files)
    installed(folder)
    found = {info.name: info for info in plugins.load().found}
    assert found[f"my-{kind}"].status == "ok"
    assert found[f"my-{kind}"].source == f"erasekit-my-{kind} 0.1.0"
    its_tests(folder / "tests" / "test_contract.py")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "task"])
def test_a_single_file_passes_its_test(kind, new, tmp_path):
    written = new(kind, f"my-{kind}", single_file=True)
    assert written.files == [tmp_path / f"my_{kind}.py"]
    assert f"--plugin {written.files[0]}" in written.use
    try:
        its_tests(written.files[0])
    finally:
        sys.modules.pop(f"my_{kind}", None)


def test_a_task_in_one_file_is_its_toml_file(new, tmp_path):
    assert new("task", "my-task", single_file=True).files == [tmp_path / "my-task.toml"]
    check_task(str(tmp_path / "my-task.toml"))


def test_what_is_written_is_well_formed(new, tmp_path):
    for kind in KINDS:
        new(kind, f"my-{kind}")
        new(kind, f"my-{kind}", single_file=True)
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["methd", "mine"], "Unknown kind of plugin 'methd'. Did you mean 'method'?"),
        (
            ["method", "My Method"],
            "'My Method' is no name of a method. Use lower-case letters, digits and single hyphens: my-method.",
        ),
        (["method", "none"], "'none' is no name of a method."),
        (["method", "esd"], "There is a method 'esd' already, of 'esd' (erasekit"),
        (["task", "objects"], "There is a task 'objects' already"),
        (["backbone", "sd1.5"], "'sd1.5' is no name of a backbone."),
        (["method", "torch", "--single-file"], "There is a Python module 'torch' already, which the file would hide."),
        (["method", "taken"], "erasekit-taken' exists already. Choose another name, or another folder with --out."),
        (["method", "held", "--single-file"], "held.py' exists already."),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, line, tmp_path, capsys):
    (tmp_path / "erasekit-taken").mkdir()
    (tmp_path / "held.py").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["new", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_prints_files_to_stdout_and_what_comes_next_to_stderr(tmp_path, capsys):
    assert main(["new", "evaluator", "my-eye", "--single-file", "--out", str(tmp_path / "deep")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'deep' / 'my_eye.py'}\n"
    assert "Test it:  pytest" in printed.err
    assert "evaluators = ['my-eye']" in printed.err
