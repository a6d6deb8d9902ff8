"""What a plan needs before anything is loaded: a place to write, room, memory, evaluators, prompts to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasekit.errors import UsageError
from erasekit.evaluation.evaluators import Evaluator
from erasekit.evaluation.tasks import DRAWN, PROMPT_SETS, Prompt, asked
from erasekit.places import check_place
from erasekit.registration.plugins import Registries
from erasekit.runs.plan import Plan
from erasekit.runs.preflight import preflight
from erasekit.runs.room import check_room
from erasekit.runs.rundir import path_of
from erasekit.safety import reject_unsafe


def ready(plan: Plan, prompts: Sequence[Prompt], out: Path, registries: Registries) -> list[Evaluator]:
    """See that a plan can be carried out, before anything is loaded or downloaded for it; its evaluators.

    Raises:
        UsageError: `out` cannot be written to.
        EnvironmentProblem: memory, disk, weights or packages are missing.
    """
    check_place(path_of(out, plan))
    if not plan.erasure_sha256:  # else nothing is trained
        preflight(plan, images=2 * len(prompts))
    check_room([(plan, prompts)], out)
    return judges(plan, registries)  # what they lack shows now


def judges(plan: Plan, registries: Registries) -> list[Evaluator]:
    """The task's evaluators, each with its settings."""
    return [registries.evaluators.get(name)(**settings.model_dump()) for name, settings in plan.evaluators.items()]


def evaluation_prompts(plan: Plan) -> list[Prompt]:
    """The prompts that are measured on, all sets one after the other.

    What a prompt says of its own guidance scale and size gives way to what the backbone needs and to what a user said.

    Raises:
        UsageError: there is no prompt of what is erased, or a prompt is one that erasekit refuses to draw.
    """
    sets = ("erase",) if plan.only_attacks else DRAWN
    prompts = [p for which in sets for p in asked(plan.task, which, plan.concepts, "evaluation", plan.config.limit)]
    for which in {name for name, prompts in PROMPT_SETS.items() if prompts.needed} - {p.set for p in prompts}:
        raise UsageError(f"The task '{plan.task.name}' has no prompts in the set '{which}'. Give it at least one.")
    reject_unsafe(p.text for p in prompts)
    said = {*plan.backbone.sampling, *plan.config.options.protocol}
    dropped: dict[str, Any] = {"guidance": None} if "guidance" in said else {}
    if "size" in said:
        dropped |= {"width": None, "height": None}
    return [p._replace(**dropped) for p in prompts]
