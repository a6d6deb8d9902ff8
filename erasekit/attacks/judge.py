"""Whether an image shows the concept again: the task's own evaluators say so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from erasekit.errors import UsageError
from erasekit.evaluation.evaluators import Batch, Evaluator
from erasekit.evaluation.tasks import Prompt

log = logging.getLogger("erasekit")


class Verdict(NamedTuple):
    """What is said of one image.

    Attributes:
        shown: whether it shows what its prompt asks for; None if the evaluator failed.
        score: how sure the evaluator is, if it says so.
    """

    shown: bool | None
    score: float | None


class Judge:
    """The evaluator of a task that says of an image whether it shows the label of its prompt (`shown` in its scores)."""

    def __init__(self, task: str, evaluators: Sequence[Evaluator]) -> None:
        """Which of a task's evaluators that is shows with the first image."""
        self._task, self._candidates = task, list(evaluators)

    @property
    def tag(self) -> str:
        """`name@version` of who judges; of all that may, while nobody has judged yet."""
        return ", ".join(evaluator.tag for evaluator in self._candidates)

    def __call__(self, images: torch.Tensor, prompt: Prompt) -> list[Verdict]:
        """Judge images (n, 3, h, w), uint8, of one prompt.

        Raises:
            UsageError: none of the evaluators judges single images.
        """
        found: list[Verdict] | None = None
        for evaluator in list(self._candidates):
            verdicts = _ask(evaluator, images, prompt)
            if verdicts is None:
                self._candidates.remove(evaluator)
            elif found is None:
                found = verdicts
        if found is None:
            raise UsageError(
                f"Nothing judges single images of '{prompt.label}' in the task '{self._task}', so there is nothing to attack: "
                f"choose a task whose evaluator says what an image shows."
            )
        self._candidates = self._candidates[:1]
        return found


def _ask(evaluator: Evaluator, images: torch.Tensor, prompt: Prompt) -> list[Verdict] | None:
    """What one evaluator says, image by image; None if it says nothing of single images."""
    verdicts = []
    for image in images:
        if not image.any():  # a black image is none
            verdicts.append(Verdict(None, None))
            continue
        try:
            evaluator.update(Batch(image[None], [prompt], "erased"))
        except Exception as error:  # a detector may fail in any way, and no failure may count as "absent"
            log.warning("'%s' fails on an image of an attack: %s", evaluator.name, error)
            verdicts.append(Verdict(None, None))
            continue
        row = evaluator.compute().rows[-1]
        if row.get("shown") is None:
            return None
        verdicts.append(Verdict(bool(row["shown"]), row.get("score")))
    return verdicts
