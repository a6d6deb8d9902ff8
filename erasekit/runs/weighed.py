"""What a table says of the erasures of a row, beside what was measured on images: their files, and their own predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from pydantic import BaseModel, ConfigDict

from erasekit.erasures.manifest import ALL, MANIFEST, PROMPTS, SETTINGS
from erasekit.erasures.remains import Residual
from erasekit.runs.records import read_whole

FILES = (ALL, PROMPTS, SETTINGS)  # what a user loads


class Predicted(BaseModel):
    """What erasure.json says of its own predictions."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    residual: dict[str, Residual] | None = None
    drift: float | None = None


def weighed(folders: Sequence[Path]) -> dict[str, float]:
    """Means over saved erasures, of what they have.

    Args:
        folders: of erasures; one that is not there counts as empty, one that is damaged as not measured.

    Returns:
        `file_kb`; `residual`, the most that is left of a concept by name or in other words; `drift` of what stays.
    """
    found = {"file_kb": mean(_kilobytes(folder) for folder in folders)}
    said = [one for folder in folders if (one := read_whole(Predicted, folder / MANIFEST))]
    every = [own for one in said for own in (one.residual or {}).values()]
    if left := [own.most for own in every if (own.prompts, own.other_words) != (None, None)]:
        found["residual"] = mean(left)
    if moved := [one.drift for one in said if one.drift is not None]:
        found["drift"] = mean(moved)
    return {name: round(value, 4) for name, value in found.items()}


def _kilobytes(folder: Path) -> float:
    return sum((folder / file).stat().st_size for file in FILES if (folder / file).is_file()) / 1000
