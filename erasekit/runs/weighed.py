"""What a table says of the erasures of a row, beside what was measured on images: their files, and their own predictions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from erasekit.erasures.manifest import ALL, MANIFEST, PROMPTS, SETTINGS
from erasekit.erasures.remains import Remains

FILES = (ALL, PROMPTS, SETTINGS)  # what a user loads


def weighed(folders: Sequence[Path]) -> dict[str, float]:
    """Means over saved erasures, of what they have.

    Args:
        folders: of erasures; one that is not there counts as empty.

    Returns:
        `file_kb`; `residual`, the most that is left of a concept by name or in other words; `drift` of what stays.
    """
    found = {"file_kb": mean(_kilobytes(folder) for folder in folders)}
    manifests = [json.loads((f / MANIFEST).read_text("utf-8")) for f in folders if (f / MANIFEST).is_file()]
    remains = [Remains.model_validate({"residual": m.get("residual") or {}, "drift": m.get("drift")}) for m in manifests]
    if left := [
        own.most for each in remains for own in each.residual.values() if (own.prompts, own.other_words) != (None, None)
    ]:
        found["residual"] = mean(left)
    if moved := [each.drift for each in remains if each.drift is not None]:
        found["drift"] = mean(moved)
    return {name: round(value, 4) for name, value in found.items()}


def _kilobytes(folder: Path) -> float:
    return sum((folder / file).stat().st_size for file in FILES if (folder / file).is_file()) / 1000
