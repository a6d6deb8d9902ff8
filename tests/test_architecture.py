"""The arrows between the parts, read from the imports."""

import ast
from pathlib import Path

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


def test_files_and_functions_stay_small():
    for path in [*(ROOT / "erasekit").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 75, f"{path}: {node.name}"
