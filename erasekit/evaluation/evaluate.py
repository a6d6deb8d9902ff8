"""Images of both sides through every evaluator, and on to the task's metrics."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erasekit.concepts import Concept
from erasekit.errors import ErasekitError
from erasekit.evaluation.evaluators import Batch, Evaluator, Side
from erasekit.evaluation.results import Metric
from erasekit.evaluation.sampling import load_images
from erasekit.evaluation.tasks import Prompt, Task

log = logging.getLogger("erasekit")


class Evaluation(NamedTuple):
    """What was measured.

    Attributes:
        rows: one per image of both sides: index, prompt, seed, label, set, concept, side, file, failed, and all scores.
        metrics: the task's and the evaluators' numbers.
        counts: images of both sides: images, scored, failed (not scored by some evaluator), no_face (a face was asked for
            and none was found).
    """

    rows: list[dict[str, Any]]
    metrics: dict[str, Metric]
    counts: dict[str, int]


def evaluate(
    task: Task,
    evaluators: Sequence[Evaluator],
    prompts: Sequence[Prompt],
    base_paths: Sequence[Path],
    erased_paths: Sequence[Path],
    *,
    concepts: Sequence[Concept],
    batch: int = 64,
) -> Evaluation:
    """Show every evaluator the images of both sides and turn the scores into the task's metrics.

    An image that cannot be read, is black all over or makes an evaluator fail is counted as failed and left out of every share.

    Raises:
        ErasekitError: an evaluator failed on every image, so there is nothing to report.
    """
    rows: list[dict[str, Any]] = []
    scored_by: dict[str, list[int]] = {e.name: [] for e in evaluators}
    problems: dict[str, Exception] = {}
    paths: dict[Side, Sequence[Path]] = {"base": base_paths, "erased": erased_paths}
    for side, files in paths.items():
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            images, unreadable = load_images(files[start : start + batch])
            offset = len(rows)
            rows += [_row(start + i, p, side, files[start + i]) for i, p in enumerate(part)]
            readable = [i for i in range(len(part)) if i not in unreadable]
            for evaluator in evaluators:
                taken = _show(evaluator, Batch(images, [part[i] for i in readable], side), problems) if readable else []
                scored_by[evaluator.name] += [offset + readable[i] for i in taken]
    metrics = _merge(rows, evaluators, scored_by, problems)
    usable = {str(side): [r for r in rows if r["side"] == side and not r["failed"]] for side in paths}
    tags = {e.name: e.tag for e in evaluators}
    metrics = {**task.aggregate(usable, concepts), **metrics}
    metrics = {k: m.model_copy(update={"evaluator": tags.get(m.evaluator, m.evaluator)}) for k, m in metrics.items()}
    return Evaluation(rows, metrics, _counts(rows, judged=bool(evaluators)))


def _row(index: int, prompt: Prompt, side: Side, path: Path) -> dict[str, Any]:
    columns = {"prompt": prompt.text, "seed": prompt.seed, "set": prompt.set, "label": prompt.label, "concept": prompt.concept}
    return {"index": index, **columns, "side": side, "file": path.name, "failed": False}


def _show(evaluator: Evaluator, batch: Batch, problems: dict[str, Exception]) -> list[int]:
    """Show a batch, image by image if it fails as a whole; the positions that were taken."""
    try:
        evaluator.update(batch)
        return list(range(len(batch.prompts)))
    except Exception as error:  # a detector may fail in any way, and a failure must be counted, whatever it is
        if len(batch.prompts) == 1 and evaluator.name not in problems:
            problems[evaluator.name] = error
            log.warning("'%s' fails on an image of '%s': %s", evaluator.name, batch.prompts[0].text, error)
        if len(batch.prompts) == 1:
            return []
    singles = [Batch(batch.images[i : i + 1], [p], batch.side) for i, p in enumerate(batch.prompts)]
    return [i for i, single in enumerate(singles) if _show(evaluator, single, problems)]


def _merge(
    rows: list[dict[str, Any]],
    evaluators: Sequence[Evaluator],
    scored_by: dict[str, list[int]],
    problems: dict[str, Exception],
) -> dict[str, Metric]:
    """Put every evaluator's scores into the rows; its metrics of whole sets."""
    metrics: dict[str, Metric] = {}
    for evaluator in evaluators:
        taken = scored_by[evaluator.name]
        if rows and not taken:
            why = problems.get(evaluator.name, "every image is unreadable or black")
            raise ErasekitError(f"Evaluator '{evaluator.name}' failed on every image: {why}")
        scores = evaluator.compute()
        for i, found in zip(taken, scores.rows, strict=True):
            if clash := found.keys() & rows[i].keys():
                raise ValueError(f"Two evaluators give the score {sorted(clash)}; '{evaluator.name}' has to rename its own.")
            rows[i].update(found)
        for i in set(range(len(rows))) - set(taken):
            rows[i]["failed"] = True
        metrics |= scores.metrics
    return metrics


def _counts(rows: list[dict[str, Any]], *, judged: bool) -> dict[str, int]:
    failed = sum(r["failed"] for r in rows)
    no_face = sum(bool(r.get("no_face")) for r in rows)
    return {"images": len(rows), "scored": len(rows) - failed if judged else 0, "failed": failed, "no_face": no_face}
