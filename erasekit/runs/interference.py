"""What erasures of one base take with them: images of each thing that is asked for, under each erasure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from erasekit.backbones.protocol import Backbone
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into, unload
from erasekit.evaluation.curves import Interference
from erasekit.evaluation.evaluate import evaluate
from erasekit.evaluation.interference import interference_of
from erasekit.evaluation.sampling import sample
from erasekit.evaluation.tasks import Prompt
from erasekit.registration.plugins import Registries, default
from erasekit.runs.plan import Plan
from erasekit.runs.ready import judges
from erasekit.runs.together import plan_of


def interference(
    folders: Sequence[Path],
    images: int,
    *,
    task: str = "",
    backbone: Mapping[str, Any] | None = None,
    registries: Registries | None = None,
) -> Interference:
    """The share of images that show what they were asked for, a row for each erasure, a column for each thing.

    Args:
        folders: erasures of one base; the last one holds the concepts of all.
        images: how many of each erased concept, and of each thing that has to stay.
        task: whose evaluation prompts are drawn; the domain's usual one, if left out.
        backbone: settings of the backbone.
        registries: what names stand for; what is installed, if left out.
    """
    registries = registries or default()
    erasures = [Erasure.load(folder) for folder in folders]
    plan = plan_of(erasures[-1], task, backbone or {}, registries)
    base = plan.backbone.load(plan.backbone_config)
    prompts = _prompts(plan, images)
    base.encode(["", *(p.text for p in prompts)])
    with TemporaryDirectory() as place:
        drawn = [
            _draw(plan, base, folder, prompts, Path(place, str(i)), registries.components.get)
            for i, folder in enumerate((None, *folders))
        ]
        found = [
            evaluate(plan.task, judges(plan, registries), prompts, drawn[0], paths, concepts=plan.concepts)
            for paths in drawn[1:]
        ]
    return interference_of({", ".join(c.name for c in e.concepts): f.rows for e, f in zip(erasures, found, strict=True)})


def _prompts(plan: Plan, images: int) -> list[Prompt]:
    """So many evaluation prompts of each erased concept and of each thing that has to stay."""
    asked: dict[str, list[Prompt]] = {}
    for which in ("erase", "preserve"):
        for prompt in plan.task.prompts(which, plan.concepts, "evaluation"):
            asked.setdefault(prompt.concept or prompt.label, []).append(prompt)
    return [prompt for of in asked.values() for prompt in of[:images]]


def _draw(
    plan: Plan,
    base: Backbone,
    folder: Path | None,
    prompts: Sequence[Prompt],
    place: Path,
    component: Callable[[str, str], Any],
) -> list[Path]:
    """The prompts drawn under an erasure, or under none."""
    pipe = base.pipeline(encoders=False, shared=True)
    if folder is not None:
        load_into(pipe, folder, base=base, component=component)
    encoded, empty = base.encode([p.text for p in prompts]), base.encode([""])
    try:
        return sample(base, pipe, prompts, encoded, empty, plan.protocol, place)
    finally:
        unload(pipe)
