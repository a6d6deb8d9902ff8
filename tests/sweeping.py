"""What tests of sweeps share: a small grid in the tiny world, and the counting of what was done for it."""

import json

from erasekit.evaluation.results import read_result
from erasekit.sweeps.suite import Suite
from tests.conftest import THIRD_PARTY

FILES = (THIRD_PARTY / "tiny_world.py", THIRD_PARTY / "counted.py")
BOTH = [("cat", 0), ("cat", 1), ("dog", 0), ("dog", 1)]
DRAWN = 6  # rows for the five images of a concept: a call of an odd number is filled up
IMAGES = (DRAWN + 2) + 4 * DRAWN  # the base's once, of which the second concept has two of its own, and those of four erasures


def grid_of(folder, **changes):
    where = {"path": str(folder), "device": "cpu"}
    values = {"methods": ("counted",), "backbones": ("counted",), "seeds": (0, 1), "tasks": ("words",)}
    return Suite(**{**values, "run": {"options": {"backbone": where}}, **changes})


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def counted(lines):
    """What was done: (concept, seed) of every erasure, images drawn, models loaded."""
    erased = sorted((line["erased"], line["seed"]) for line in lines if "erased" in line)
    return erased, sum(line.get("images", 0) for line in lines), sum("loaded" in line for line in lines)


def numbers(swept):
    return {cell.path: read_result(swept.out / cell.path / "results.json").metrics for cell, _ in swept.cells}
