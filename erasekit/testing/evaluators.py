"""What every evaluator owes: a row for each image, whatever company it is seen in, and an account of its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from erasekit.evaluation.evaluators import Batch, Evaluator, Side
from erasekit.evaluation.judgement import judgement_in
from erasekit.evaluation.metrics import MEASURES, split
from erasekit.evaluation.results import Metric
from erasekit.evaluation.tasks import Prompt
from erasekit.testing.worlds import Plugins, check_fields, owe, owe_none, with_world

RESERVED = ("index", "prompt", "seed", "set", "label", "concept", "side", "file", "failed", "judge")
SIDES: tuple[Side, ...] = ("base", "erased")


def check_evaluator(
    name: str, *, settings: Mapping[str, Any] | None = None, label: str = "cat", size: int = 64, plugin: Plugins = ()
) -> None:
    """See that an evaluator keeps its contract, on images of noise.

    Args:
        name: the registered name.
        settings: of the evaluator.
        label: what the prompts ask for; one that the evaluator knows, if it knows some.
        size: side of the images in pixels.
        plugin: the file of an evaluator that is not installed.

    Raises:
        AssertionError: something is broken; says what.
        EnvironmentProblem: its weights cannot be had.
    """
    kind = with_world(plugin).evaluators.get(name)
    what, values = f"'{name}'", dict(settings or {})
    owe(isinstance(kind, type) and issubclass(kind, Evaluator), f"{what} is no subclass of erasekit.Evaluator.")
    check_fields(what, kind.Config)
    check_description(what, kind(**values))
    batches = [_batch(label, size, side) for side in SIDES]
    kept = [batch.images.clone() for batch in batches]
    together, apart = kind(**values), kind(**values)
    for batch in batches:
        together.update(batch)
        for i in range(len(batch.prompts)):
            apart.update(Batch(batch.images[i : i + 1], [batch.prompts[i]], batch.side))
    owe(all(map(torch.equal, kept, [b.images for b in batches])), f"{what}: update() changes the images that it is given.")
    rows, singly = together.compute().rows, apart.compute().rows
    wanted = sum(len(batch.prompts) for batch in batches)
    owe(
        len(rows) == wanted, f"{what}: compute() gives {len(rows)} rows for {wanted} images. Give {{}} where there is no score."
    )
    for mine, alone in zip(rows, singly, strict=True):
        check_row(what, mine)
        owe(_alike(mine, alone), f"{what}: an image's scores depend on its batch: {mine}, alone {alone}.")
    check_metrics(what, name, kind, together.compute().metrics)
    check_failure(what, kind(**values), _batch(label, size, "erased"))


def check_description(what: str, evaluator: Evaluator) -> None:
    """The description is part of the protocol, and so plain data."""
    given = evaluator.describe()
    missing = [key for key in ("model", "version", "sha256") if not isinstance(given.get(key), str)]
    owe_none(missing, f"{what}: describe() does not say '{{}}' as text. A model without weights has the sha256 ''.")
    try:
        json.dumps(given)
    except TypeError as error:
        raise AssertionError(f"{what}: describe() is no plain data: {error}.") from error


def _batch(label: str, size: int, side: Side) -> Batch:
    """An image of each set: of noise, the same ones every time."""
    generator = torch.Generator().manual_seed(SIDES.index(side))
    prompts = [
        Prompt(f"a photo of a {label}", 0, label, "erase", label),
        Prompt("a photo of a dog", 1, "dog", "preserve"),
        Prompt("a photo of a street", 2, "", "clean"),
    ]
    return Batch(torch.randint(256, (3, 3, size, size), dtype=torch.uint8, generator=generator), prompts, side)


def check_row(what: str, row: Mapping[str, Any]) -> None:
    """The scores of one image are columns of scores.parquet."""
    owe_none([key for key in row if key in RESERVED], f"{what}: a score is called '{{}}', which a row has already. Rename it.")
    try:
        json.dumps(row)
        judgement_in(row)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{what}: the scores {row} are no plain data, or no judgement: {error}") from error


def _alike(one: Any, other: Any) -> bool:
    """Whether two rows say the same, to rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-3 * max(1.0, abs(one))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def check_metrics(what: str, name: str, kind: type[Evaluator], metrics: Mapping[str, Any]) -> None:
    """Metrics of whole sets have a meaning, and say whose they are."""
    for key, metric in metrics.items():
        owe(isinstance(metric, Metric), f"{what}: the metric '{key}' is no erasekit.evaluation.results.Metric.")
        owe(metric.evaluator == name, f"{what}: the metric '{key}' says that it is by '{metric.evaluator}'.")
        plain = split(key)[0]
        owe(plain in kind.meanings or plain in MEASURES, f"{what}: nothing says what '{key}' means. Put it into `meanings`.")


def check_failure(what: str, evaluator: Evaluator, batch: Batch) -> None:
    """An image that cannot be judged is taken, or raised and not taken."""
    nothing = Batch(torch.zeros(1, 3, 0, 0, dtype=torch.uint8), batch.prompts[:1], batch.side)
    taken = 1
    try:
        evaluator.update(nothing)
    except Exception:
        taken = 0
    evaluator.update(batch)
    rows = len(evaluator.compute().rows)
    owe(rows == taken + 3, f"{what}: after an image that it could not judge it gives {rows} rows for {taken + 3} images taken.")
