"""What a shell is told when somebody presses the tab key, asked as the shell asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from erasekit.cli import main
from tests.conftest import THIRD_PARTY

WORLD = THIRD_PARTY / "tiny_world.py"
LOADED = "import sys; from erasekit.cli import main; main(); print('HEAVY', *{'torch', 'diffusers'} & set(sys.modules))"


@pytest.fixture
def completed(capsys, monkeypatch):
    def asked(line: str) -> list[str]:
        """The names that bash is given for a line."""
        for name, value in words(line).items():
            monkeypatch.setenv(name, value)
        assert main() == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        return shown.out.split()

    return asked


def words(line: str) -> dict[str, str]:
    """The variables by which bash asks."""
    return {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "_ERASEKIT_COMPLETE": "complete_bash"}


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("erasekit ex", ["export"]),
        ("erasekit run --method eras", ["eraseanything", "eraseflow"]),
        ("erasekit run -b flux-", ["flux-mini", "flux-schnell"]),
        ("erasekit erase --task ob", ["objects"]),
        ("erasekit attack x -a ring", ["ring-a-bell"]),
        ("erasekit export x --to ko", ["kohya"]),
        ("erasekit where sd15-", ["sd15-mini"]),
        ("erasekit ls exp", ["exporters"]),
        ("erasekit plugins mac", ["mace"]),
        ("erasekit ablate trac", ["trace"]),
        ("erasekit new ", ["method", "backbone", "task", "evaluator", "attack"]),
        ("erasekit erase --kind sty", ["style"]),
        ("erasekit export x --files fl", ["float32", "float16"]),
        ("erasekit run --vram 1", ["12", "16", "141"]),
        ("erasekit sweep x --launcher sl", ["slurm"]),
        ("erasekit run --method nobody", []),
        (f"erasekit run --plugin {WORLD} -m pul", ["pull"]),
        ("erasekit run --plugin not-there.py -m uc", ["uce"]),
    ],
)
def test_names_are_completed(completed, line, some):
    assert completed(line) == some


def test_no_torch_is_imported_for_it():
    done = subprocess.run(
        [sys.executable, "-c", LOADED], env=os.environ | words("erasekit run -m u"), capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["uce", "HEAVY"]
