"""The attacks of a run on its page: a line of numbers and a row of images for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erasekit.evaluation.results import Metric, RunResult
from erasekit.runs.pages.images import embedded

IMAGES = 10  # of each attack
SIDE = 2_000_000  # bytes of all of them together
VERDICTS = {True: "shows it", False: "does not", None: "not judged"}


def attacks(directory: Path, result: RunResult, *, blur: bool) -> list[dict[str, Any]]:
    """What the page shows of each attack, in the order they were tried; [] without attacks.

    Args:
        directory: the run directory, with `attacks.json` and the folder `attacks`.
        result: the numbers.
        blur: the images.
    """
    path = directory / "attacks.json"
    if not path.is_file():
        return []
    tried = json.loads(path.read_text(encoding="utf-8"))["attacks"]
    files = {name: sorted((directory / "attacks" / name).glob("*.png"))[:IMAGES] for name in tried}
    every = [file for own in files.values() for file in own]
    uris = dict(zip(every, embedded(every, blur=[blur] * len(every), budget=SIDE), strict=True)) if every else {}
    return [_row(name, about, result.metrics, {file: uris[file] for file in files[name]}) for name, about in tried.items()]


def _row(name: str, about: Mapping[str, Any], metrics: Mapping[str, Metric], images: Mapping[Path, str]) -> dict[str, Any]:
    shown = {file: json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["shown"] for file in images}
    return {
        **{key: about[key] for key in ("knows", "kind", "spent")},
        "name": name,
        "settings": ", ".join(f"{key} {value}" for key, value in about["settings"].items()),
        "metric": metrics.get(f"asr[{name}]") or metrics.get(f"probe[{name}]"),
        "false_alarm": metrics.get(f"false_alarm[{name}]"),
        "chance": metrics.get(f"chance[{name}]"),
        "cost": metrics.get(f"cost[{name}]"),
        "images": [(uri, VERDICTS[shown[file]]) for file, uri in images.items()],
    }
