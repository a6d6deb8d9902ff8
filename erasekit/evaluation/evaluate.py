"""Images of both sides through every evaluator, and on to the task's metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from erasekit.concepts import Concept
from erasekit.errors import ErasekitError
from erasekit.evaluation.evaluators import Batch, Evaluator, Rows, Scores, Side
from erasekit.evaluation.judgement import FIELDS, Judgement, judgement_in, merged
from erasekit.evaluation.kept_scores import KeptScores, score_key
from erasekit.evaluation.metrics import MEASURES, split
from erasekit.evaluation.results import Metric
from erasekit.evaluation.sampling import load_image
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
    kept: KeptScores | None = None,
) -> Evaluation:
    """Show every evaluator the images of both sides and turn the scores into the task's metrics.

    An image that cannot be read, is black all over or makes an evaluator fail is counted as failed and left out of every share.

    Args:
        task: whose metrics.
        evaluators: what looks at the images.
        prompts: what was drawn.
        base_paths: the unedited model's images.
        erased_paths: the erased model's.
        concepts: what was erased.
        batch: how many images are read at once.
        kept: what evaluators of single images have said before; they are shown only what is missing there.

    Raises:
        ErasekitError: an evaluator failed on every image, so there is nothing to report.
    """
    paths: dict[Side, Sequence[Path]] = {"base": base_paths, "erased": erased_paths}
    rows = [_row(i, p, side, files[i]) for side, files in paths.items() for i, p in enumerate(prompts)]
    showing = _showing(evaluators, kept, prompts, [*base_paths, *erased_paths])
    for side, files in paths.items():
        first = 0 if side == "base" else len(prompts)
        for start in range(0, len(prompts), batch):
            here = range(start, min(start + batch, len(prompts)))
            wanted = [i for i in here if any(first + i not in shown.rows for shown in showing)]
            for group, images in _alike({i: load_image(files[i]) for i in wanted}):
                for shown in showing:
                    shown.show(group, images, [prompts[i] for i in group], side, first)
    for shown in showing:
        shown.collect(len(rows))
        if kept and shown.keys:
            kept.add(shown.evaluator, {shown.keys[i]: shown.rows[i] for i in shown.order})
    metrics = _merge(rows, showing)
    usable = {side: [r for r in rows if r["side"] == side and not r["failed"]] for side in paths}
    for evaluator in evaluators:
        metrics |= _explained(evaluator, evaluator.metrics_of(usable))
    tags = {e.name: e.tag for e in evaluators}
    asked = {p.set for p in prompts}
    metrics = {**_aggregated(task, usable, concepts), **metrics}
    metrics = {name: _tagged(m, tags) for name, m in metrics.items() if m.value is not None or _rests_on(name) <= asked}
    return Evaluation(rows, metrics, _counts(rows, judged=bool(evaluators)))


def _aggregated(task: Task, rows: Rows, concepts: Sequence[Concept]) -> dict[str, Metric]:
    """The task's own metrics.

    Raises:
        ErasekitError: the task fails, or gives something else.
    """
    try:
        found = task.aggregate({str(side): of for side, of in rows.items()}, concepts)
        if other := [name for name, metric in dict(found).items() if not isinstance(metric, Metric)]:
            raise TypeError(f"'{other[0]}' is no erasekit.evaluation.results.Metric")
    except Exception as error:
        keys = ", ".join(next(iter(rows["base"]), {})) or "nothing: every image failed"
        line = f"The task '{task.name}' fails in 'aggregate': {type(error).__name__}: {error}. Its rows have {keys}"
        raise ErasekitError(f"{line}. Correct it; the images are kept.") from error
    return found


@dataclass
class Showing:
    """An evaluator, and what it says of the images of a run.

    Attributes:
        rows: its scores, by the index of the image among those of both sides; what it has said before is there from the start.
        keys: of all images, for what it says of them to be kept; none if that is not kept.
        order: the images that it was shown, in order, and took.
        problem: the first error that it raised on a single image.
        metrics: its numbers of whole sets.
    """

    evaluator: Evaluator
    rows: dict[int, dict[str, Any]]
    keys: Sequence[str] = ()
    order: list[int] = field(default_factory=list)
    problem: Exception | str = "every image is unreadable or black"
    metrics: dict[str, Metric] = field(default_factory=dict)

    def show(self, group: Sequence[int], images: torch.Tensor, prompts: Sequence[Prompt], side: Side, first: int) -> None:
        """Show it those of a group of images that it has said nothing of."""
        new = [k for k, i in enumerate(group) if first + i not in self.rows]
        if new:
            part = Batch(images if len(new) == len(group) else images[new], [prompts[k] for k in new], side)
            self.order += [first + group[new[k]] for k in self._taken(part)]

    def _taken(self, batch: Batch) -> list[int]:
        """Show a batch, image by image if it fails as a whole; the positions that were taken."""
        try:
            self.evaluator.update(batch)
            return list(range(len(batch.prompts)))
        except Exception as error:  # a detector may fail in any way, and a failure must be counted, whatever it is
            if len(batch.prompts) == 1:
                if isinstance(self.problem, str):
                    self.problem = error
                    log.warning("'%s' fails on an image of '%s': %s", self.evaluator.name, batch.prompts[0].text, error)
                return []
        singles = [Batch(batch.images[i : i + 1], [p], batch.side) for i, p in enumerate(batch.prompts)]
        return [i for i, single in enumerate(singles) if self._taken(single)]

    def collect(self, images: int) -> None:
        """Take what it has to say of what it was shown.

        Raises:
            ErasekitError: it failed on every image, or says what it should not.
        """
        if images and not self.order and not self.rows:
            raise ErasekitError(f"Evaluator '{self.evaluator.name}' failed on every image: {self.problem}")
        scores = _computed(self.evaluator, len(self.order))
        self.rows |= dict(zip(self.order, scores.rows, strict=True))
        self.metrics = scores.metrics


def _showing(
    evaluators: Sequence[Evaluator], kept: KeptScores | None, prompts: Sequence[Prompt], paths: Sequence[Path]
) -> list[Showing]:
    """All evaluators; those of single images with what they have said of these before."""
    if kept is None or not any(e.per_image for e in evaluators):
        return [Showing(e, {}) for e in evaluators]
    keys, showing = [score_key(path, p) for path, p in zip(paths, [*prompts, *prompts], strict=True)], []
    for evaluator in evaluators:
        before = kept.of(evaluator) if evaluator.per_image else {}
        rows = {i: before[key] for i, key in enumerate(keys) if key in before}
        showing.append(Showing(evaluator, rows, keys if evaluator.per_image else ()))
    return showing


def _alike(images: Mapping[int, torch.Tensor | None]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The images that could be read, those of one size together: their indices, and (n, 3, h, w)."""
    sizes: dict[torch.Size, list[int]] = {}
    for i, image in images.items():
        if image is not None:
            sizes.setdefault(image.shape, []).append(i)
    for group in sizes.values():
        yield group, torch.stack([image for i in group if (image := images[i]) is not None])


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


def _merge(rows: list[dict[str, Any]], showing: Sequence[Showing]) -> dict[str, Metric]:
    """Put every evaluator's scores into the rows; its metrics of whole sets."""
    metrics: dict[str, Metric] = {}
    judged: dict[int, dict[str, Judgement]] = {}
    for shown in showing:
        evaluator = shown.evaluator
        for i, found in sorted(shown.rows.items()):
            _add(rows[i], found, evaluator.name, judged.setdefault(i, {}))
        for i in set(range(len(rows))) - set(shown.rows):
            rows[i]["failed"] = True
        metrics |= _explained(evaluator, shown.metrics)
    for i, given in judged.items():
        if given:
            rows[i].update(merged(given, [shown.evaluator.name for shown in showing]))
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


def _explained(evaluator: Evaluator, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """An evaluator's own numbers with what they mean."""
    meanings = {name: evaluator.meanings.get(split(name)[0], "") for name in metrics}
    return {name: metric.model_copy(update={"meaning": meanings[name]}) for name, metric in metrics.items()}


def _counts(rows: list[dict[str, Any]], *, judged: bool) -> dict[str, int]:
    failed = sum(r["failed"] for r in rows)
    no_face = sum(bool(r.get("no_face")) for r in rows)
    return {"images": len(rows), "scored": len(rows) - failed if judged else 0, "failed": failed, "no_face": no_face}
