"""Each concept of a task is erased in turn, and all are measured: a sweep of one method, and the matrix of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erasekit.errors import ErasekitError, UsageError
from erasekit.evaluation.curves import INTERFERENCE, Interference
from erasekit.evaluation.interference import interference_of
from erasekit.evaluation.results import read_scores
from erasekit.registration.plugins import Registries
from erasekit.runs.config import RunConfig
from erasekit.runs.resolve import resolve
from erasekit.sweeps.suite import Suite
from erasekit.sweeps.sweep import Swept

AXES = {"method", "backbone", "task", "concepts", "seed"}


def matrix_suite(config: RunConfig, registries: Registries) -> Suite:
    """The suite that erases the concepts of a configuration, or else all of its task, one by one.

    Raises:
        UsageError: something in the configuration is wrong, there are fewer than two concepts, or nothing judges the images.
    """
    plan = resolve(config, registries)
    if not plan.task.evaluators:
        raise UsageError(
            f"The task '{plan.task.name}' judges nothing, so that there is no matrix. Choose one that does: --task."
        )
    if len(plan.concepts) < 2:
        name = plan.concepts[0].name
        raise UsageError(f"A matrix needs two concepts or more, given '{name}' alone. Name others: --concept A --concept B.")
    rest: Mapping[str, Any] = config.model_dump(mode="json", exclude_defaults=True, exclude=AXES)
    return Suite(
        title=f"What erasing each concept takes with it: {plan.config.method} on {plan.config.backbone}",
        methods=(plan.config.method,),
        backbones=(plan.config.backbone,),
        tasks=(config.task,),
        concepts={config.task: config.concepts} if config.concepts else {},
        seeds=(config.seed,),
        run=dict(rest),
    )


def matrix_of(swept: Swept) -> Interference:
    """The matrix of a sweep's finished runs, a row for each; written into its folder too.

    Raises:
        ErasekitError: no run is finished.
    """
    done = [cell for cell, how in swept.cells if how.state == "finished"]
    if not done:
        raise ErasekitError("No run is finished, so that there is no matrix.")
    rows = {", ".join(cell.config["concepts"]): read_scores(swept.out / cell.path / "scores.parquet") for cell in done}
    measured = interference_of({name.partition(":")[0]: found for name, found in rows.items()})
    measured.write(swept.folder / INTERFERENCE)
    return measured
