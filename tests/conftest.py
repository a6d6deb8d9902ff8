"""Fixtures that several tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

THIRD_PARTY = Path(__file__).parent / "third_party"


@pytest.fixture(scope="session")
def world() -> Path:
    """The plugin file with a whole tiny world."""
    return THIRD_PARTY / "tiny_world.py"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion folder with random weights."""
    from tests import tiny

    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory) -> Path:
    """A tiny FLUX folder with random weights."""
    from tests import tiny_flux

    return tiny_flux.save_pipeline(tmp_path_factory.mktemp("base") / "flux")


@pytest.fixture
def erasekit(tmp_path):
    """Run the command line in a process of its own, in an empty folder."""

    def call(*arguments: object, environment: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
        root = str(Path(__file__).parents[1])
        paths = os.pathsep.join([root, str(Path(root) / "plugins")])
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})}
        command = [sys.executable, "-m", "erasekit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False, **options)

    return call
