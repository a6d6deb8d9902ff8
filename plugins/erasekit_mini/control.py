"""A concept that no mini model has learned: mushrooms. What an attack finds of it is a false alarm.

The mushrooms are drawn by this file, in the manner of the world's other things. What judges them is one more layer on the
features of the mini classifier (`benchmarks/mini/train_control.py` makes it).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from erasekit.concepts import Concept
from erasekit.errors import unknown
from erasekit.evaluation.evaluators import Batch, Evaluator, Scores
from erasekit.evaluation.tasks import Prompt, Split, Task
from erasekit_mini import vocabulary as words
from erasekit_mini.evaluators import MODELS, load_classifier, present, sha256, to_input

NAME = "mushroom"
SIZE, OVERSAMPLED = 64, 4
CAP, SPOT, STEM, EDGE = (178, 60, 48), (250, 240, 230), (240, 226, 200), (110, 40, 34)
GROUNDS = ((214, 69, 65), (88, 176, 96), (74, 126, 214), (240, 205, 85), (150, 98, 190), (238, 238, 238), (140, 140, 145))
SEED = 600_000  # beyond those of the other prompt sets


def mushroom(seed: int) -> Image.Image:
    """One mushroom on a plain ground, 64 px: place, size, spots and ground are the seed's."""
    rng = random.Random(f"mushroom/{seed}")
    side = SIZE * OVERSAMPLED
    image = Image.new("RGB", (side, side), rng.choice(GROUNDS))
    draw = ImageDraw.Draw(image)
    width = side * rng.uniform(0.55, 0.75)
    x, y = side / 2 + side * rng.uniform(-0.08, 0.08), side / 2 + side * rng.uniform(-0.03, 0.07)
    stem, height, line = width * rng.uniform(0.26, 0.34), width * 0.95, OVERSAMPLED
    box = (x - stem / 2, y - height * 0.1, x + stem / 2, y + height / 2)
    draw.rounded_rectangle(box, stem / 3, STEM, EDGE, line)
    cap = (x - width / 2, y - height / 2, x + width / 2, y + height * 0.4)
    draw.pieslice(cap, 180, 360, CAP, EDGE, line)
    for across, up in ((-0.3, 0.14), (0.02, 0.3), (0.28, 0.16), (-0.08, 0.1)):
        r = width * rng.uniform(0.05, 0.08)
        at = (x + width * (across + rng.uniform(-0.03, 0.03)), y - height * up)
        draw.ellipse((at[0] - r, at[1] - r, at[0] + r, at[1] + r), SPOT)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


class Control(Task):
    """Prompts for a mushroom, and images of some."""

    name = "control"
    domain = "mini"
    title = "A concept that no model of the mini world has learned"
    concepts = (NAME,)
    evaluators = ("mini-control",)
    metrics = ("acc_e",)

    def concept(self, text: str) -> Concept:
        """The mushroom.

        Raises:
            UsageError: the name is another one.
        """
        parsed = Concept.parse(text)
        if parsed.name != NAME:
            raise unknown("concept", parsed.name, self.concepts, "erasekit ls tasks")
        phrases, templates = (words.article(NAME), *parsed.phrases[1:]), words.FRAMES["train"]
        return Concept(name=NAME, kind="object", phrases=phrases, neutral="a background", templates=templates)

    def prompts(self, which: str, concepts: Sequence[Concept], split: Split, limit: int | None = None) -> list[Prompt]:
        """Fifty prompts that name it; there are no other sets."""
        rows = words.object_prompts(NAME, split, 50)[:limit] if which == "erase" else []
        return [Prompt(row.prompt, words.seed_of(split, SEED + k), NAME, which, NAME) for k, row in enumerate(rows)]

    def images(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """A mushroom for each prompt, (n, 3, 64, 64) uint8."""
        return torch.stack([torch.from_numpy(np.array(mushroom(p.seed))).permute(2, 0, 1) for p in prompts])


class ControlJudge(Evaluator):
    """Whether an image shows a mushroom: a linear layer on the features of the mini classifier."""

    name = "mini-control"
    FILE: ClassVar[str] = "control"

    def __init__(self, folder: Path = MODELS / "evaluators") -> None:
        """Load the classifier, the layer and its threshold."""
        weights, card = folder / f"{self.FILE}.safetensors", folder / f"{self.FILE}.json"
        present(weights, card)
        self._net, layer, record = load_classifier(folder), load_file(weights), json.loads(card.read_text(encoding="utf-8"))
        self._weight, self._bias, self._least = layer["weight"].float(), layer["bias"].float(), float(record["threshold"])
        self.version = str(record["version"])
        self._sha256 = sha256(folder / "classifier.safetensors", weights)
        self._rows: list[dict[str, Any]] = []

    def describe(self) -> dict[str, str]:
        """The network and its weights."""
        return {"model": "MiniClassifier, one more layer", "version": self.version, "sha256": self._sha256}

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Judge a batch."""
        features = self._net(to_input(batch.images))["features"]
        scores = (features @ self._weight + self._bias).sigmoid().tolist()
        shown = [score >= self._least for score in scores]
        self._rows += [{"seen": [NAME] * s, "shown": s, "score": score} for s, score in zip(shown, scores, strict=True)]

    def compute(self) -> Scores:
        """A row per image."""
        return Scores(self._rows)
