"""What evaluators have said of single images, kept beside them: a judge that is described as before judges an image once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erasekit.evaluation.evaluators import Evaluator
from erasekit.evaluation.tasks import Prompt
from erasekit.registration.source import source_digest

Row = dict[str, Any]


class KeptScores:
    """Rows of evaluators that look at one image at a time (`Evaluator.per_image`), a file of JSON lines for each."""

    def __init__(self, folder: Path) -> None:
        """Keep them in a folder."""
        self._folder = folder

    def of(self, evaluator: Evaluator) -> dict[str, Row]:
        """What an evaluator, described as it is now, has said: {`score_key` of the image: its row}."""
        path, found = self._path(evaluator), {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                key, row = json.loads(line)
            except ValueError:  # cut short when its writer was killed
                continue
            found[key] = row
        return found

    def add(self, evaluator: Evaluator, rows: Mapping[str, Row]) -> None:
        """Keep more."""
        if rows:
            path = self._path(evaluator)
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps([key, row], default=_plain) + "\n" for key, row in rows.items())
            with path.open("a", encoding="utf-8") as file:
                file.write(("" if _ends_a_line(path) else "\n") + lines)

    def _path(self, evaluator: Evaluator) -> Path:
        source = source_digest(type(evaluator).__module__)
        said_by = [evaluator.tag, evaluator.describe(), *([source] if source else [])]
        return self._folder / f"{evaluator.name}-{_digest(said_by)}.jsonl"


def score_key(image: Path, prompt: Prompt) -> str:
    """Sixteen hex digits over an image's bytes and what it was asked for, which a judge is told too; "" if there is none."""
    try:
        pixels = hashlib.sha256(image.read_bytes()).hexdigest()
    except OSError:
        return ""
    return _digest([pixels, prompt.text, prompt.label, prompt.set, prompt.concept])


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _ends_a_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def _plain(value: Any) -> Any:
    """Numbers of numpy or torch as Python's own."""
    return value.tolist()
