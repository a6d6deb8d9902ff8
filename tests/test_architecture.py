"""The arrows between the parts, read from the imports."""

import ast
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(p.name for p in (ROOT / "plugins").iterdir() if (p / "__init__.py").is_file())


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; strings that are lazy targets too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", sorted((ROOT / "erasekit").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_erasekit_imports_no_plugin(path):
    assert not roots(path) & {*PLUGINS, "tests"}


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_plugin_imports_no_other_plugin_and_nothing_private(path):
    own = path.relative_to(ROOT / "plugins").parts[0]
    assert not roots(path) & ({*PLUGINS, "tests"} - {own})
    assert not [n for n in imports(path) if n.startswith("erasekit.") and any(part.startswith("_") for part in n.split("."))]


def test_only_the_command_line_prints():
    for path in sorted((ROOT / "erasekit").rglob("*.py")):
        if "cli" not in path.parts:
            assert not roots(path) & {"rich", "typer"} or path.name in ("plugins.py", "hookspecs.py"), path
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def test_nothing_is_pickled():
    for path in [*(ROOT / "erasekit").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in roots(path), path
        assert "torch.save(" not in text, path
        assert "torch.load(" not in text, path


# From the ground floor up: a room may know those below it, whether it imports them at once, lazily or for types alone.
ROOMS = (
    "ground",
    "registration",
    "backbones",
    "evaluation",
    "erasures",
    "methods",
    "attacks",
    "runs",
    "sweeps",
    "testing",
    "cli",
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "erasekit").rglob("*.py")
    if path.parent != ROOT / "erasekit" or path.stem not in ("__init__", "__main__")
}


def room(module: str) -> str:
    return next((part for part in module.split(".")[1:2] if part in ROOMS), "ground")


def arrows() -> dict[str, set[str]]:
    """The modules that each module of erasekit imports."""
    return {module: (imports(path) & MODULES.keys()) - {module} - rooms_above(module) for module, path in MODULES.items()}


def rooms_above(module: str) -> set[str]:
    """The packages that a module lies in: importing a neighbour names them too."""
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def test_no_room_knows_one_above_it():
    up = [(a, b) for a, found in arrows().items() for b in found if ROOMS.index(room(b)) > ROOMS.index(room(a))]
    assert not up


def test_no_import_goes_in_a_circle():
    graph, done, path = arrows(), set(), []

    def visit(module: str) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            path.append(module)
            for other in graph[module]:
                visit(other)
            done.add(path.pop())

    for module in graph:
        visit(module)


def test_files_and_functions_stay_small():
    lengths = []
    for path in [*(ROOT / "erasekit").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        lengths.append(text.count("\n"))
        assert lengths[-1] <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 75, f"{path}: {node.name}"
    assert median(lengths) < 110
