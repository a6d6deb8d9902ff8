"""The README's and the tutorial's own code blocks, in their order, with nothing but the installed wheel.

`nox -s build` runs this in an environment that holds the wheel. Only two things are not run as they stand: what installs
erasekit, since the wheel is there already, and the tutorial's variations, which are shown (`--dry-run`) and not done.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
INSTALLS = re.compile(r"^pip install -e \.( && |\n)", re.MULTILINE)
FOR_DEVELOPERS = 'pip install -e ".[dev]"'
RUN = re.compile(r"^(erasekit run\b[^#\n]*?)( *#.*)?$", re.MULTILINE)


class Block(NamedTuple):
    language: str
    text: str
    before: str  # the line above it


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf-8")
    found = re.finditer(r"([^\n]*)\n+```(\w*)\n(.*?)```", text, re.DOTALL)
    return [Block(match[2], match[3], match[1]) for match in found]


def run(block: Block, folder: Path) -> None:
    """Run a block as somebody does who has copied it into a terminal or a file."""
    lines = block.text
    if block.language != "python":
        lines = INSTALLS.sub("", lines)
        if block.before.startswith("Then try a variation"):
            lines = RUN.sub(r"\1 --dry-run", lines.replace(" --dry-run", ""))
    own = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    command = [sys.executable, "-c", lines] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", lines]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reader")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def test_erasekit_is_the_installed_one(folder):
    installed = "import pathlib, erasekit\nassert 'site-packages' in pathlib.Path(erasekit.__file__).parts, erasekit.__file__"
    run(Block("python", installed, ""), folder)


def test_the_readme(folder):
    found = [block for block in blocks("README.md") if not block.text.startswith(FOR_DEVELOPERS)]
    assert [block.language for block in found] == ["", "python"]
    for block in found:
        run(block, folder)
    (directory,) = (folder / "runs" / "sd15-mini" / "objects" / "trace").glob("*/")
    metrics = json.loads((directory / "results.json").read_text())["metrics"]
    assert metrics["acc_e"]["value"] < 0.2 < 0.8 < metrics["acc_e"]["base"]
    assert (directory / "report.html").stat().st_size > 100_000
    assert pixels(folder / "no-cat.png").std() > 10


def test_the_tutorial(folder):
    found = blocks("docs/tutorial.md")
    assert [block.language for block in found] == ["bash", "python", "bash", "bash", "python", "bash"]
    for block in found:
        run(block, folder)
    merged, lora = pixels(folder / "merged.png"), pixels(folder / "lora.png")
    assert merged.std() > 10
    assert np.abs(merged - lora).max() <= 1
