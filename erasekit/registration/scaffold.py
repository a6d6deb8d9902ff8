"""Writes the beginning of a plugin: a package with an entry point and a test, or a single file."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from typing import NamedTuple

import jinja2

from erasekit.atomic import replacing_folder
from erasekit.errors import UsageError, unknown
from erasekit.places import check_place
from erasekit.registration.plugins import Registries

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
TEMPLATES = Path(__file__).parents[1] / "templates" / "new"
KINDS = {  # each with the call of its test
    "method": 'check_method("{name}"{plugin})',
    "backbone": 'check_backbone("{name}", settings={{"path": str(tiny_folder("tiny"))}}, size=16{plugin})',
    "task": 'check_task("mini/{name}"{plugin})',
    "evaluator": 'check_evaluator("{name}"{plugin})',
    "attack": 'check_attack("{name}"{plugin})',
}


class Written(NamedTuple):
    """What was written.

    Attributes:
        files: all files.
        test: the commands that test it.
        use: the command that uses it.
    """

    files: list[Path]
    test: str
    use: str


def scaffold(kind: str, name: str, where: Path, registries: Registries, *, single_file: bool = False) -> Written:
    """Write a plugin that works and passes its contract test; its author changes it from there.

    Args:
        kind: one of `KINDS`.
        name: what it will be registered as, e.g. "my-method".
        where: the folder that it is written into.
        registries: whose names are taken.
        single_file: one file for `--plugin` (of a task for `--task`) in place of a package.

    Raises:
        UsageError: there is no such kind, the name is no name or is taken, or there is such a file already.
    """
    if kind not in KINDS:
        raise unknown("kind of plugin", kind, KINDS, "erasekit new --help")
    if not NAME.fullmatch(name) or keyword.iskeyword(_class(name)):
        raise UsageError(f"'{name}' is no name of a {kind}. Use lower-case letters, digits and single hyphens: my-{kind}.")
    names = getattr(registries, f"{kind}s")
    for entry in names.entries():
        if name in (entry.name, entry.name.split("/")[-1], *entry.aliases):
            raise UsageError(f"There is a {kind} '{name}' already, of '{entry.plugin}' ({entry.source}). Choose another name.")
    if single_file:
        if kind != "task" and importlib.util.find_spec(_module(name)):
            raise UsageError(
                f"There is a Python module '{_module(name)}' already, which the file would hide. Choose another name."
            )
        return _file(kind, name, where)
    return _package(kind, name, where)


def _file(kind: str, name: str, where: Path) -> Written:
    suffix = "toml" if kind == "task" else "py"
    path = where / (f"{name}.toml" if kind == "task" else f"{_module(name)}.py")
    _refuse(path)
    where.mkdir(parents=True, exist_ok=True)
    path.write_text(_rendered(f"{kind}.{suffix}.j2", kind, name, single=True), encoding="utf-8")
    if kind == "task":
        check = f"from erasekit.testing import check_task; check_task('{path}')"
        return Written([path], f'python -c "{check}"', f"erasekit run --task {path}")
    return Written([path], f"pytest {path}", _use(kind, name, f" --plugin {path}"))


def _package(kind: str, name: str, where: Path) -> Written:
    folder = where / f"erasekit-{name}"
    _refuse(folder)
    source, suffix = f"src/erasekit_{_module(name)}", "toml" if kind == "task" else "py"
    files = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"{source}/__init__.py": "init.py.j2",
        f"{source}/{kind}.{suffix}": f"{kind}.{suffix}.j2",
        "tests/test_contract.py": "test_contract.py.j2",
    }
    where.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as temporary:
        for path, template in files.items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_text(_rendered(template, kind, name, single=False), encoding="utf-8")
    return Written([folder / path for path in files], f"pip install -e {folder} && pytest {folder}", _use(kind, name))


def _refuse(path: Path) -> None:
    check_place(path)
    if path.exists():
        raise UsageError(f"'{path}' exists already. Choose another name, or another folder with --out.")


def _module(name: str) -> str:
    return name.replace("-", "_")


def _class(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("-"))


def _use(kind: str, name: str, plugin: str = "") -> str:
    """A command that uses it."""
    flags = {
        "backbone": f"--method uce --backbone {name} --concept 'a cat'",
        "evaluator": "--task FILE.toml",
        "attack": f"--method uce --attack {name}",
    }
    named = f" (with evaluators = ['{name}'] in the task's file)" if kind == "evaluator" else ""
    return f"erasekit run {flags.get(kind, f'--{kind} {name}')}{plugin}{named}"


def _rendered(template: str, kind: str, name: str, *, single: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    call = KINDS[kind].format(name=name, plugin=", plugin=__file__" if single else "")
    checks = f"check_{kind}" if kind != "backbone" else "check_backbone, tiny_folder"
    return environment.get_template(template).render(
        kind=kind, name=name, module=_module(name), cls=_class(name), single=single, call=call, checks=checks
    )
