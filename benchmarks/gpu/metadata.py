"""Make a checkout's own plugins found without installing it: write its entry points to a folder for PYTHONPATH.

    python benchmarks/gpu/metadata.py FOLDER
    PYTHONPATH=.:plugins:FOLDER python -m erasekit ls

An installed erasekit is the same without any of this.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def write_metadata(folder: Path) -> Path:
    """Write a `.dist-info` of erasekit, made from pyproject.toml, into `folder`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name']}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    points = project["entry-points"]["erasekit"]
    (info / "entry_points.txt").write_text("[erasekit]\n" + "".join(f"{name} = {module}\n" for name, module in points.items()))
    return folder


if __name__ == "__main__":
    write_metadata(Path(sys.argv[1]))
