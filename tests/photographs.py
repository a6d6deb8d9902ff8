"""Real photographs that ship in packages, and what is asked of an evaluator that looks at them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from erasekit.evaluation.evaluators import Batch, Evaluator
from erasekit.evaluation.tasks import Prompt

FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
FILES = {
    "astronaut": "skimage/astronaut.png",  # a woman in a space suit, a rocket behind her
    "cat": "skimage/chelsea.png",
    "coffee": "skimage/coffee.png",
    "rocket": "skimage/rocket.jpg",
    "motorcycle": "skimage/motorcycle_left.png",
    "palace": "sklearn/china.jpg",
    "flower": "sklearn/flower.jpg",
}


def path(name: str) -> Path:
    """The file of a photograph."""
    package, _, file = FILES[name].partition("/")
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / FOLDERS[package] / file


def photograph(name: str) -> Image.Image:
    with Image.open(path(name)) as image:
        return image.convert("RGB")


def tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, h, w) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def small_faces() -> list[Image.Image]:
    """Fifty faces of 25 x 25 pixels (Labeled Faces in the Wild), enlarged and on grey."""
    faces = np.load(path("cat").with_name("lfw_subset.npy"))[:50]
    images = []
    for face in faces:
        large = Image.fromarray((face * 255).clip(0, 255).astype(np.uint8)).resize((150, 150), Image.Resampling.BICUBIC)
        image = Image.new("RGB", (260, 260), (128, 128, 128))
        image.paste(large.convert("RGB"), (55, 55))
        images.append(image)
    return images


def seen_by(evaluator: Evaluator, image: Image.Image, label: str = "", text: str = "a photo") -> dict[str, Any]:
    """The row that an evaluator gives an image."""
    evaluator.update(Batch(tensor(image), [Prompt(text, 0, label, "erase")], "erased"))
    return evaluator.compute().rows[-1]
