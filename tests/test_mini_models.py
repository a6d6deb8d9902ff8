"""The shipped mini models: that they load as they are, and carry nothing of the machine they were made on."""

from __future__ import annotations

import pytest
import torch

from erasekit.evaluation.evaluators import Batch
from erasekit.evaluation.tasks import Prompt
from erasekit_mini.evaluators import MODELS, ClipScore

LIMIT_MB = 12


def test_the_clip_scorer_judges_with_the_shipped_half_precision_weights() -> None:
    scorer = ClipScore()
    prompts = [Prompt("a photo of a cat", 1, set="clean"), Prompt("a photo of a dog", 2, set="clean")]
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scorer.update(Batch(images, prompts, "base"))
    scorer.update(Batch(images, prompts, "erased"))
    assert len(scorer.compute().rows) == 4


def test_configurations_name_no_folder_of_the_machine_that_trained_them() -> None:
    for path in MODELS.rglob("*.json"):
        assert '_name_or_path": "/' not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("name", ["sd15-mini", "flux-mini"])
def test_the_models_are_small(name: str) -> None:
    total = sum(path.stat().st_size for path in (MODELS / name).rglob("*") if path.is_file())
    assert 1e6 < total <= LIMIT_MB * 1e6
