"""The heat map of a page: which erasure takes what else with it."""

from __future__ import annotations

from typing import Any

from erasekit.evaluation.curves import Interference
from erasekit.runs.pages import plots

MOST_CELLS = 2500  # of a heat map on a page


def heat_map(measured: Interference | None) -> dict[str, Any]:
    """What the template draws of it: a row for each erasure, with the base's on top; {} if there is none, or far too much."""
    if measured is None or len(measured.erased) * len(measured.asked) > MOST_CELLS:
        return {}
    rows = [("nothing (base)", measured.base)] if measured.base else []
    rows += list(zip(measured.erased, measured.values, strict=True))
    values = [v for _, row in rows for v in row if v is not None]
    low, high = min(0.0, *values, 0.0), max(1.0, *values, 1.0)
    said = "A cell is the share of such images that show it." if measured.metric == "seen" else f"A cell is {measured.metric}."
    if measured.images:
        counts = sorted({n for row in measured.images for n in row if n})
        said += f" It rests on {counts[0]} to {counts[-1]} images." if len(counts) > 1 else f" It rests on {counts[0]} images."
    shade = [lambda value: plots.level(value, low, high)] * len(measured.asked)
    return {"asked": measured.asked, "rows": rows, "meaning": said, "shades": shade, "own": own}


def own(erased: str, asked: str) -> bool:
    """Whether a cell's column is what its row erases."""
    return asked in erased.split(", ")
