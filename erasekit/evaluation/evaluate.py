"""Images of both sides through every evaluator, and on to the task's metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erasekit.concepts import Concept
from erasekit.errors import ErasekitError
from erasekit.evaluation.evaluators import Batch, Evaluator, Scores, Side
from erasekit.evaluation.judgement import FIELDS, Judgement, judgement_in, merged
from erasekit.evaluation.metrics import MEASURES, split
from erasekit.evaluation.results import Metric
from erasekit.evaluation.sampling import load_images
from erasekit.evaluation.tasks import Prompt, Task

log = logging.getLogger("erasekit")


class Evaluation(NamedTuple):
    """What was measured.

    Attributes:
        rows: one per image of both sides: index, prompt, seed, label, set, concept, side, file, failed, all scores, and what
            the judges say (see `judgement.merged`).
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
    asked = {p.set for p in prompts}
    metrics = {**_aggregated(task, usable, concepts), **metrics}
    metrics = {name: _tagged(m, tags) for name, m in metrics.items() if m.value is not None or _rests_on(name) <= asked}
    return Evaluation(rows, metrics, _counts(rows, judged=bool(evaluators)))


def _aggregated(task: Task, rows: Mapping[str, list[dict[str, Any]]], concepts: Sequence[Concept]) -> dict[str, Metric]:
    """The task's own metrics.

    Raises:
        ErasekitError: the task fails, or gives something else.
    """
    try:
        found = task.aggregate(rows, concepts)
        if other := [name for name, metric in dict(found).items() if not isinstance(metric, Metric)]:
            raise TypeError(f"'{other[0]}' is no erasekit.evaluation.results.Metric")
    except Exception as error:
        keys = ", ".join(next(iter(rows["base"]), {})) or "nothing: every image failed"
        line = f"The task '{task.name}' fails in 'aggregate': {type(error).__name__}: {error}. Its rows have {keys}"
        raise ErasekitError(f"{line}. Correct it; the images are kept.") from error
    return found


def _rests_on(metric: str) -> set[str]:
    """The prompt sets without which there is no such metric; what evaluators give of whole sets, they give of clean images."""
    measure = MEASURES.get(split(metric)[0])
    return set(measure.needs) if measure else {"clean"}


def _tagged(metric: Metric, tags: Mapping[str, str]) -> Metric:
    """The metric with the versions of the evaluators that it names."""
    names = metric.evaluator.split(", ")
    return metric.model_copy(update={"evaluator": ", ".join(tags.get(name, name) for name in names)})


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
    judged: dict[int, dict[str, Judgement]] = {}
    for evaluator in evaluators:
        taken = scored_by[evaluator.name]
        if rows and not taken:
            why = problems.get(evaluator.name, "every image is unreadable or black")
            raise ErasekitError(f"Evaluator '{evaluator.name}' failed on every image: {why}")
        scores = _computed(evaluator, len(taken))
        for i, found in zip(taken, scores.rows, strict=True):
            _add(rows[i], found, evaluator.name, judged.setdefault(i, {}))
        for i in set(range(len(rows))) - set(taken):
            rows[i]["failed"] = True
        metrics |= {name: m.model_copy(update={"meaning": _meaning(evaluator, name)}) for name, m in scores.metrics.items()}
    for i, given in judged.items():
        if given:
            rows[i].update(merged(given, [e.name for e in evaluators]))
    return metrics


def _computed(evaluator: Evaluator, images: int) -> Scores:
    """What an evaluator says of the images that it has taken.

    Raises:
        ErasekitError: it says something of fewer or more, or gives something else.
    """
    scores: Any = evaluator.compute()
    if not isinstance(scores, Scores):
        line = f"Evaluator '{evaluator.name}' returns {type(scores).__name__} from 'compute', not Scores"
        raise ErasekitError(f"{line}. End it with 'return Scores(rows)'.")
    if len(scores.rows) != images:
        line = f"Evaluator '{evaluator.name}' gives {len(scores.rows)} rows for {images} images"
        raise ErasekitError(f"{line}. Give a row for each, {{}} where there is no score.")
    return scores


def _add(row: dict[str, Any], found: Mapping[str, Any], evaluator: str, judged: dict[str, Judgement]) -> None:
    """Put an evaluator's scores of an image into its row, and its judgement into `judged`.

    Raises:
        ErasekitError: it gives a score that another one gives too, or a judgement of the wrong type.
    """
    try:
        judgement = judgement_in(found)
    except ValueError as error:
        raise ErasekitError(f"Evaluator '{evaluator}' is no judge as it should be. {error}") from error
    if judgement is not None:
        judged[evaluator] = judgement
    columns = {key: value for key, value in found.items() if judgement is None or key not in FIELDS}
    if clash := columns.keys() & {*row, *FIELDS, "judge"}:
        names = ", ".join(sorted(clash))
        raise ErasekitError(f"Evaluator '{evaluator}' gives the score {names}, which another one gives. Rename it.")
    row.update(columns)


def _meaning(evaluator: Evaluator, metric: str) -> str:
    return evaluator.meanings.get(split(metric)[0], "")


def _counts(rows: list[dict[str, Any]], *, judged: bool) -> dict[str, int]:
    failed = sum(r["failed"] for r in rows)
    no_face = sum(bool(r.get("no_face")) for r in rows)
    return {"images": len(rows), "scored": len(rows) - failed if judged else 0, "failed": failed, "no_face": no_face}
