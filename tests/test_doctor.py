"""What `erasekit doctor` prints can be pasted into a bug report."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from erasekit.cli import main
from erasekit.runs import doctor
from erasekit.runs.doctor import without_folders


def test_doctor_names_no_folder_of_the_machine(capsys, tmp_path, monkeypatch):
    broken = tmp_path / "Jane Doe" / "broken.py"
    broken.parent.mkdir()
    broken.write_text("import torch\nraise OSError(f'no file {torch.__file__} and {__file__}')\n")
    monkeypatch.setenv("HOME", str(broken.parent))
    monkeypatch.setenv("ERASEKIT_CACHE", str(tmp_path / "cache"))
    assert main(["doctor", "--json", "--plugin", str(broken)]) == 3
    out = capsys.readouterr().out
    found = {check["name"]: check["detail"] for check in json.loads(out)}
    assert str(tmp_path) not in out
    assert "Jane" not in out
    assert str(Path(torch.__file__).parent) not in out
    assert "__init__.py" in out
    assert "broken.py" in out
    assert found["ERASEKIT_CACHE"] == "cache"
    assert found["system"] == platform.platform()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("in /home/jane/a.py, line 3", "in a.py, line 3"),
        (r"C:\Users\jane\a.py is missing", "a.py is missing"),
        ("('~/x/y')", "('y')"),
        ("see https://huggingface.co/a/b", "see https://huggingface.co/a/b"),
        ("2 of 3, 1/2, a/b", "2 of 3, 1/2, a/b"),
    ],
)
def test_folders_are_left_out_of_a_text(text, left):
    assert without_folders(text) == left


def test_extras_are_named_with_what_is_missing_of_them(tmp_path, monkeypatch):
    metadata = tmp_path / "erasekit-1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    lines = ["Requires-Dist: torch>=2.6", *(f'Requires-Dist: {name}>=1; extra == "mine"' for name in ("pytest", "not-there"))]
    metadata.write_text("\n".join(["Metadata-Version: 2.4", "Name: erasekit", "Version: 1", *lines]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = doctor._extras()
    assert check == ("extra mine", "ok", f"pytest {pytest.__version__}, no not-there")
