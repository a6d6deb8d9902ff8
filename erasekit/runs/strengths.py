"""What is left of a concept, and of the rest, at every strength of an erasure: the images of a run drawn again at each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasekit.backbones.protocol import Backbone
from erasekit.erasures.loading import load_into, unload
from erasekit.errors import UsageError
from erasekit.evaluation.curves import STRENGTH, Curve, Point, Strength
from erasekit.evaluation.evaluate import evaluate
from erasekit.evaluation.results import Metric
from erasekit.evaluation.sampling import model_key, sample
from erasekit.evaluation.tasks import Prompt
from erasekit.events import Listener, Sampled
from erasekit.registration.plugins import Registries, default
from erasekit.runs.config import build
from erasekit.runs.plan import Plan
from erasekit.runs.ready import evaluation_prompts, judges
from erasekit.runs.runner import planned

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def measure_strength(
    directory: Path,
    strengths: Sequence[float] = STRENGTHS,
    *,
    limit: int | None = 20,
    registries: Registries | None = None,
    listener: Listener | None = None,
) -> Strength:
    """Draw and judge the evaluation prompts of a finished run at several strengths, and write `strength.json` into it.

    What is drawn is kept (`images/strength-0.5/`), so that a second call draws only what is new.

    Args:
        directory: the run.
        strengths: what the erasure's deltas are multiplied by; 0 is the base, 1 the erasure as it is.
        limit: the most images per prompt set, None for as many as the run drew.
        registries: what names stand for; what is installed, if left out.
        listener: is told how far drawing is.

    Raises:
        UsageError: the directory holds no run of one erasure, or no strength is given.
    """
    if not strengths:
        raise UsageError("No strength was given. Give some, e.g. --at 0 --at 0.5 --at 1.")
    erasure = directory / "erasure"
    if not (directory / "config.toml").is_file() or not erasure.is_dir():
        raise UsageError(f"'{directory}' holds no run of an erasure. Give the folder of a finished run.")
    registries, config = registries or default(), build({}, file=directory / "config.toml")
    plan = planned(config.model_copy(update={"limit": limit or config.limit}), registries, erasure=erasure)
    prompts = evaluation_prompts(plan)
    backbone = plan.backbone.load(plan.backbone_config)
    backbone.encode(["", *(p.text for p in prompts)])
    drawn = {s: _draw(plan, backbone, directory, s, prompts, registries, listener) for s in sorted({0.0, *strengths})}
    found: dict[float, dict[str, Metric]] = {}
    for strength in sorted(set(strengths)):
        evaluators = judges(plan, registries)
        evaluation = evaluate(plan.task, evaluators, prompts, drawn[0.0], drawn[strength], concepts=plan.concepts)
        found[strength] = evaluation.metrics
    measured = Strength(concepts=tuple(c.name for c in plan.concepts), curves=_curves(found))
    measured.write(directory / STRENGTH)
    return measured


def _draw(
    plan: Plan,
    backbone: Backbone,
    directory: Path,
    strength: float,
    prompts: Sequence[Prompt],
    registries: Registries,
    listener: Listener | None,
) -> list[Path]:
    """The prompts at one strength; those of the base are where all runs under the same folder keep them."""
    pipe, which = backbone.pipeline(encoders=False, shared=True), f"strength-{strength:g}"
    folder = directory / "images" / which
    if strength == 0:
        folder = directory.parents[3] / "cache" / "base" / model_key(backbone)
    else:
        component: Any = registries.components.get
        load_into(pipe, directory / "erasure", strength=strength, base=backbone, component=component)
    encoded, empty = backbone.encode([p.text for p in prompts]), backbone.encode([""])

    def told(done: int, total: int) -> None:
        if listener:
            listener(Sampled(which, done, total))

    try:
        return sample(backbone, pipe, prompts, encoded, empty, plan.protocol, folder, on_batch=told)
    finally:
        unload(pipe)


def _curves(found: dict[float, dict[str, Metric]]) -> tuple[Curve, ...]:
    """A curve for each metric that has a value at some strength."""
    curves = []
    for name, metric in next(iter(found.values())).items():
        at = {strength: metrics[name] for strength, metrics in found.items() if name in metrics}
        points = [Point(strength=s, value=m.value, ci95=m.ci95, n=m.n) for s, m in at.items() if m.value is not None]
        if points:
            curves.append(Curve(metric=name, higher_is_better=metric.higher_is_better, points=tuple(points)))
    return tuple(curves)
