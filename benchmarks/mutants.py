"""Break the pure modules one place at a time, and see whether a test of theirs notices (mutation testing).

    python benchmarks/mutants.py --sample 25 --seed 0 --workers 2 --out benchmarks/results/mutants.json

A mutant has one operator, comparison, constant, branch, call or return changed. It is met by those of the module's tests that
run the changed line, the quickest first, each mutant in a forked process that has torch imported already. The result is
written after every mutant, and the same command goes on after those that are there. `--sample 0` takes all of them.

Sentences are left as they are: error messages, descriptions, docstrings, all texts with a space in them. So are type hints.
Survivors that nobody can tell from the original, and the reasons, are in `benchmarks/survivors.toml`.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

ROOT = Path(__file__).parents[1]
MODULES = {
    "erasekit/methods/closedform.py": ("closedform",),
    "erasekit/erasures/deltas.py": ("deltas",),
    "erasekit/backbones/schedule.py": ("schedule",),
    "erasekit/evaluation/metrics.py": ("metrics",),
    "erasekit/evaluation/intervals.py": ("evaluators", "metrics"),
    "erasekit/erasures/erasure.py": ("erasure", "manifest", "notebook"),
    "erasekit/erasures/manifest.py": ("manifest", "erasure"),
    "erasekit/safety.py": ("safety",),
    "erasekit/runs/config.py": ("config",),
    "erasekit/concepts.py": ("concepts", "config"),
}
T = TypeVar("T")
LONGEST = 8.0  # seconds of one test, on a free core; longer ones are left out
CHANGED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
WORDS_OF = {"description", "title", "summary"}  # keywords whose texts nobody computes with


@dataclass(frozen=True)
class Mutant:
    """One change: where it is, and what it does to the node with this number (in the order of `ast.walk`)."""

    module: str
    line: int
    inside: str
    kind: str
    was: str
    number: int
    nth: int = 0

    @property
    def name(self) -> str:
        """The same as long as the function stays the same, wherever it stands."""
        again = f" #{self.nth + 1}" if self.nth else ""
        return f"{self.module}:{self.inside}: {self.kind} in `{self.was}`{again}"


def _said(node: ast.AST) -> Iterator[ast.AST]:
    """Below a node, what is only said: type hints, docstrings, messages of errors, descriptions."""
    for name in ("annotation", "returns"):
        if isinstance(hint := getattr(node, name, None), ast.AST):
            yield from ast.walk(hint)
    if isinstance(node, ast.Raise):
        yield from (n for part in ast.iter_child_nodes(node) for n in ast.walk(part))
    if isinstance(node, ast.keyword) and node.arg in WORDS_OF:
        yield from ast.walk(node.value)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        yield from ast.walk(node)
    if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
        yield from ast.walk(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        yield from ast.walk(node)


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[Any], ast.AST]]]:
    """Each way to change a node: its name, and a function from a copy of the node to another node."""

    def operator(field: str, found: ast.AST) -> Iterator[tuple[str, Callable[[Any], ast.AST]]]:
        if other := CHANGED.get(type(found)):  # type: ignore[call-overload]
            yield f"{type(found).__name__} to {other.__name__}", lambda n: _with(n, field, other())

    def first(n: ast.Compare) -> ast.AST:
        return _with(n, "ops", [CHANGED[type(n.ops[0])](), *n.ops[1:]])  # type: ignore[index]

    match node:
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign():
            yield from operator("op", node.op)
        case ast.Compare():
            yield f"{type(node.ops[0]).__name__} to {CHANGED[type(node.ops[0])].__name__}", first  # type: ignore[index]
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield f"no {type(node.op).__name__}", lambda n: n.operand
        case ast.Constant(value=bool(value)):
            yield f"{value} to {not value}", lambda n: ast.Constant(not n.value)
        case ast.Constant(value=int(value)):
            yield f"{value} to {value + 1}", lambda n: ast.Constant(n.value + 1)
        case ast.Constant(value=float(value)):
            yield f"{value} to {value * 1.5 + 0.5}", lambda n: ast.Constant(n.value * 1.5 + 0.5)
        case ast.Constant(value=str(value)) if " " not in value.strip():
            yield "other text", lambda n: ast.Constant(n.value + "x")
        case ast.If() | ast.IfExp():
            yield "branch turned", lambda n: _with(n, "test", ast.UnaryOp(ast.Not(), n.test))
        case ast.comprehension(ifs=[_, *_]):
            yield "filter turned", lambda n: _with(n, "ifs", [ast.UnaryOp(ast.Not(), n.ifs[0]), *n.ifs[1:]])
        case ast.Return(value=ast.AST()):
            yield "returns None", lambda n: ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield "left out", lambda n: ast.Pass()


def _with(node: Any, field: str, value: Any) -> Any:
    setattr(node, field, value)
    return node


def mutants(module: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree = ast.parse((ROOT / module).read_text())
    nodes = list(ast.walk(tree))
    number = {id(node): i for i, node in enumerate(nodes)}
    said = {id(n) for node in nodes for n in _said(node) if n is not node or not isinstance(node, ast.Raise)}
    above = {id(below): node for node in nodes for below in ast.iter_child_nodes(node)}
    inside: dict[int, str] = {}
    for node in nodes:  # outer ones come first
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            outer = inside.get(id(node), "")
            inside |= {id(n): f"{outer}.{node.name}".strip(".") for n in ast.walk(node)}
    found: list[Mutant] = []
    for node in nodes:
        line = getattr(node, "lineno", getattr(getattr(node, "target", None), "lineno", 0))
        if id(node) in said:
            continue
        for kind, _ in changes(node):
            shown = node.test if isinstance(node, ast.If) else above[id(node)] if isinstance(node, ast.Constant) else node
            was = " ".join(ast.unparse(shown).split())[:90]
            found.append(Mutant(module, line, inside.get(id(node), "module"), kind, was, number[id(node)]))
    seen: dict[str, int] = defaultdict(int)
    for i, one in enumerate(sorted(found, key=lambda m: (m.line, m.number))):
        found[i] = Mutant(**vars(one) | {"nth": seen[one.name]})
        seen[one.name] += 1
    return found


def changed(mutant: Mutant) -> ast.Module:
    """The module with the change."""
    tree = ast.parse((ROOT / mutant.module).read_text())
    node = list(ast.walk(tree))[mutant.number]
    change = next(c for kind, c in changes(node) if kind == mutant.kind)

    class Change(ast.NodeTransformer):
        def visit(self, other: ast.AST) -> Any:
            return change(copy.copy(other)) if other is node else super().generic_visit(other)

    return ast.fix_missing_locations(Change().visit(tree))


class Finder(importlib.abc.MetaPathFinder):
    """Gives the changed module wherever the module is imported."""

    def __init__(self, mutant: Mutant) -> None:
        """Compile it."""
        self.module = mutant.module.removesuffix(".py").replace("/", ".")
        self.path = str(ROOT / mutant.module)
        self.code = compile(changed(mutant), self.path, "exec")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module, if it is this one."""
        if name != self.module:
            return None
        code = self.code

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                return code

        return importlib.util.spec_from_file_location(name, self.path, loader=Loader(name, self.path))


class Lines:
    """A plugin of pytest: which lines of a module each test runs, and how long it takes."""

    def __init__(self, module: str) -> None:
        """Watch a module."""
        self.path, self.now, self.lines = str(ROOT / module), "", defaultdict(set)
        self.took: dict[str, float] = {}

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        """Note a line of the module; other files cost a call each."""
        if frame.f_code.co_filename != self.path:
            return None
        self.lines[self.now].add(frame.f_lineno)
        return self.trace

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        """A test begins."""
        self.now, self.began = nodeid, time.process_time()
        sys.settrace(self.trace)

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        """A test has ended."""
        sys.settrace(None)
        self.took[nodeid] = time.process_time() - self.began


def in_children(wanted: Iterable[tuple[T, float]], work: Callable[[T], Any], workers: int) -> Iterator[tuple[T, Any, str]]:
    """What a function returns for each thing, in forked processes, so many at a time, as they end.

    Args:
        wanted: things, each with the seconds of a core that it may take.
        work: the function.
        workers: how many at a time.

    Yields:
        The thing; what came out, None if the process ended otherwise or took too long; the last that it printed.
    """
    waiting: dict[int, tuple[T, Path, int, float]] = {}
    queue = iter(wanted)
    while True:
        while len(waiting) < workers and (given := next(queue, None)):
            thing, seconds = given
            place = Path(tempfile.mkdtemp(prefix="mutant-"))
            if not (child := os.fork()):
                _child(place, seconds, partial(work, thing))
            waiting[child] = (thing, place, os.pidfd_open(child), time.monotonic() + 20 * seconds)
        if not waiting:
            return
        select.select([row[2] for row in waiting.values()], [], [], 5)
        for child, (thing, place, descriptor, until) in list(waiting.items()):
            if time.monotonic() > until:  # it waits for something, and takes no time of a core
                os.kill(child, signal.SIGKILL)
            if os.waitpid(child, os.WNOHANG)[0]:
                os.close(descriptor)
                del waiting[child]
                found = json.loads((place / "found.json").read_text()) if (place / "found.json").exists() else None
                said = (place / "said.txt").read_text(errors="replace")[-2000:] if (place / "said.txt").exists() else ""
                shutil.rmtree(place, ignore_errors=True)
                yield thing, found, said


def _child(place: Path, seconds: float, work: Callable[[], Any]) -> NoReturn:
    """Work in a folder of its own within so many seconds of a core, and end."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    nowhere = os.open(place / "said.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(place / "hypothesis")
    tempfile.tempdir = str(place)
    with suppress(BaseException):
        (place / "part").write_text(json.dumps(work()))
        (place / "part").rename(place / "found.json")
    os._exit(0)


def pytest_with(tests: list[str], place: Path, *plugins: Any) -> int:
    """Run tests in this process, until one fails."""
    import pytest

    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-p", "no:randomly", "--hypothesis-seed=0", "--timeout=0"]
    return int(pytest.main([*options, "--basetemp", str(place / "tests"), *tests], plugins=list(plugins)))


def tests_of(modules: list[str], folder: Path, workers: int) -> dict[str, Any]:
    """For each module its quick tests with the lines that they run, and the libraries to import first; kept in a folder."""

    def work(module: str) -> Any:
        watch = Lines(module)
        if code := pytest_with([f"tests/test_{name}.py" for name in MODULES[module]], Path(tempfile.mkdtemp()), watch):
            return {"failed": code}
        of = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name != "__main__"}
        libraries = [name for name, file in of.items() if not Path(file or "/").is_relative_to(ROOT)]
        tests = {t: {"took": watch.took[t], "lines": sorted(watch.lines[t])} for t in watch.took}
        return {"tests": tests, "libraries": libraries}

    found = {}
    for module in modules:
        if (kept := folder / f"{module.replace('/', '-')}.json").exists():
            found[module] = json.loads(kept.read_text())
    left = [(module, 1000.0) for module in modules if module not in found]
    for module, row, said in in_children(left, work, workers):
        if not row or "failed" in row:
            raise SystemExit(f"{module}: its tests fail as it is.\n{said}")
        (folder / f"{module.replace('/', '-')}.json").write_text(json.dumps(row))
        print("baseline", module, file=sys.stderr, flush=True)
        found[module] = row
    return found


def meeting(mutant: Mutant, tests: dict[str, Any]) -> list[str]:
    """The tests that run the mutant's line, the quickest first; all of them for what stands in no function."""
    quick = {t: row for t, row in tests.items() if row["took"] <= LONGEST}
    tree = ast.parse((ROOT / mutant.module).read_text())
    spans = [(n.lineno, n.end_lineno) for n in ast.walk(tree) if isinstance(n, ast.stmt) and hasattr(n, "lineno")]
    decorator = (mutant.line, mutant.line)  # stands before the lines of what it decorates
    first, last = max((s for s in spans if s[0] <= mutant.line <= s[1]), key=lambda s: (s[0], -s[1]), default=decorator)
    lines = range(first, last + 1)
    outside = not any(isinstance(n, ast.FunctionDef) and n.name == mutant.inside.split(".")[-1] for n in ast.walk(tree))
    met = [t for t, row in quick.items() if any(line in lines for line in row["lines"])]
    if outside or not met:  # what is run when the module is imported: a constant, a default, a decorator
        met = list(quick)
    return sorted(met, key=lambda t: quick[t]["took"])


class First:
    """A plugin of pytest: the first test that fails."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test has ended."""
        if report.failed:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        """A file was read."""
        if report.failed:
            self.name = "import"


def judged(mutant: Mutant, tests: list[str]) -> dict[str, Any]:
    """Run tests with the changed module: whether one failed, and which."""
    sys.meta_path.insert(0, Finder(mutant))
    first = First()
    code = pytest_with(tests, Path(tempfile.mkdtemp()), first)
    return {"killed": code != 0, "by": first.name or ("import" if code else "")}


def measured(wanted: list[Mutant], baseline: dict[str, Any], workers: int) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """Each mutant with what became of it, so many at a time."""
    met = {mutant: meeting(mutant, baseline[mutant.module]["tests"]) for mutant in wanted}
    took = {mutant: sum(baseline[mutant.module]["tests"][t]["took"] for t in tests) for mutant, tests in met.items()}
    gc.freeze()  # what is shared with the children stays shared
    limits = ((mutant, 30 + 5 * took[mutant]) for mutant in wanted)
    for mutant, found, _ in in_children(limits, lambda m: judged(m, met[m]), workers):
        yield mutant, found or {"killed": True, "by": "time"}


def summary(rows: dict[str, Any], population: dict[str, int], command: str) -> dict[str, Any]:
    """Numbers per module and of all, and every survivor with its reason if it has one."""
    reasons = tomllib.loads((ROOT / "benchmarks" / "survivors.toml").read_text())["same"]

    def counts(of: list[dict[str, Any]]) -> dict[str, Any]:
        killed = sum(row["killed"] for row in of)
        return {"mutants": len(of), "killed": killed, "share": round(killed / len(of), 3) if of else None}

    modules = {
        m: {"population": n, **counts([r for name, r in rows.items() if name.startswith(f"{m}:")])}
        for m, n in population.items()
    }
    alive = {name: row | {"why": reasons.get(name, "")} for name, row in rows.items() if not row["killed"]}
    explained = sum(bool(row["why"]) for row in alive.values())
    whole = {"population": sum(population.values()), **counts(list(rows.values())), "survivors_explained": explained}
    return {"command": command, "all": whole, "modules": modules, "survivors": alive}


def main() -> None:
    """Change, run, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--sample", type=int, default=25, help="mutants of each module; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "erasekit-mutants", help="what is kept to go on"
    )
    parser.add_argument("--again", action="store_true", help="meet the survivors again, after new tests")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.chdir(ROOT)
    given.work.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/mutants.py --sample {given.sample} --seed {given.seed}"
    population = {module: mutants(module) for module in given.modules}
    wanted = []
    for module, all_of in population.items():
        chance = random.Random(f"{given.seed} {module}")
        wanted += chance.sample(all_of, min(given.sample or len(all_of), len(all_of)))
    random.Random(given.seed).shuffle(wanted)  # stopped early, it is a sample of all modules
    kept = given.work / "rows.jsonl"
    rows = {}
    if kept.exists():
        rows = {row["name"]: row for row in map(json.loads, kept.read_text().splitlines())}
    if given.again:
        rows = {name: row for name, row in rows.items() if row["killed"]}
    names = {mutant.name for mutant in wanted}
    rows = {name: row for name, row in rows.items() if name in names}
    left = [mutant for mutant in wanted if mutant.name not in rows]
    if given.again:
        for path in given.work.glob("erasekit-*.json"):
            path.unlink()
    baseline = tests_of(sorted({mutant.module for mutant in left}), given.work, given.workers)
    for name in sorted({name for row in baseline.values() for name in row["libraries"]}):
        with suppress(Exception):
            importlib.import_module(name)
    for mutant, found in measured(left, baseline, given.workers):
        rows[mutant.name] = {"name": mutant.name, "line": mutant.line, **found}
        with kept.open("a") as file:
            file.write(json.dumps(rows[mutant.name]) + "\n")
        print(
            len(rows),
            "of",
            len(wanted),
            "killed" if found["killed"] else "ALIVE",
            mutant.name,
            found["by"],
            file=sys.stderr,
            flush=True,
        )
        if given.out:
            record = summary(rows, {m: len(all_of) for m, all_of in population.items()}, command)
            given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(rows, {m: len(all_of) for m, all_of in population.items()}, command), indent=1))


if __name__ == "__main__":
    main()
