"""`erasekit run`: the whole line, from names to a report."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from erasekit.cli import options
from erasekit.cli.ends import put, put_json, say
from erasekit.cli.progress import duration, listener
from erasekit.cli.tables import show, tell
from erasekit.places import check_place
from erasekit.processes import here
from erasekit.runs.config import RunConfig, build
from erasekit.runs.forecast import earlier, finished, forecast
from erasekit.runs.plan import Plan
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of

if TYPE_CHECKING:
    from erasekit.registration.plugins import Registries
    from erasekit.runs.cost import Cost

KEPT = "What was finished is kept: the same command goes on from there."


def command(
    method: options.Method = None,
    backbone: options.Backbone = None,
    task: options.Task = None,
    concept: options.Concept = None,
    kind: options.Kind = None,
    neutral: options.Neutral = None,
    preserve: options.Preserve = None,
    seed: options.Seed = None,
    limit: options.Limit = None,
    preset: options.Preset = None,
    files: options.Files = None,
    sample_every: options.SampleEvery = None,
    tracker: options.Tracker = None,
    attack: options.Attack = None,
    keep_texts: options.KeepTexts = False,
    config: options.Config = None,
    settings: options.Set = None,
    vram: options.Vram = None,
    prompts: options.Prompts = None,
    out: options.Out = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan; load nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew, even if the run is finished, and compute the erasure again.")
    ] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Erase concepts, draw images before and after, measure both, and write a report.

    The same command goes on with a run that was stopped, and shows the numbers of one that is finished.
    """
    names = {"method": method, "backbone": backbone, "task": task, "concepts": tuple(concept or ())}
    names |= {"kind": kind, "neutral": neutral, "preserve": tuple(preserve or ())}
    attacks = {"attacks": tuple(attack or ()), "keep_texts": keep_texts or None}
    watched = {"sample_every": sample_every, "tracker": tracker}
    wanted = build(
        {**names, **attacks, **watched, "seed": seed, "limit": limit, "preset": preset, "files": files},
        file=config,
        overrides=options.overrides(settings, vram, prompts),
    )
    registries = options.registries(plugin)
    plan = resolve(wanted, registries)
    check_place(out)
    from erasekit.runs.packages import check_packages

    singles = plan.singles() if plan.separate else [plan]
    if dry_run or not all(finished(path_of(out, single)) for single in singles):
        check_packages(plan, registries)
    if dry_run:
        _show_plan(plan, out, anew=force, as_json=as_json)
        _check(plan, out, registries)
        return

    from erasekit.runs.runner import run

    if not here().first:  # one of several processes at this run, of which the first one tells
        run(wanted, out=out, force=force, registries=registries)
        return
    with listener(forecast(plan, out, _images(plan), anew=force)) as told:
        result = run(wanted, out=out, force=force, listener=told, registries=registries)
    if not told.started:
        say("Finished before: these are its numbers. Begin anew with --force.")
    if as_json:
        put_json(result.model_dump(mode="json"))
    else:
        show_results(plan, out)


def _check(plan: Plan, out: Path, registries: Registries) -> None:
    """See that every run of a plan could begin, as the run itself would."""
    from erasekit.runs.cost import runs_of
    from erasekit.runs.preflight import check_tracker
    from erasekit.runs.ready import ready
    from erasekit.runs.room import check_room

    check_tracker(plan.config.tracker)
    runs = runs_of(plan)
    check_room(runs, out)
    for each, drawn in runs:
        ready(each, drawn, out, registries)


def _show_plan(plan: Plan, out: Path, *, anew: bool, as_json: bool) -> None:
    """Print what would be done: every setting with what it means, and the directory of every run."""
    from erasekit.runs.cost import cost

    parts = {"backbone": plan.backbone_config, "method": plan.method_config, "protocol": plan.protocol}
    parts |= {f"components.{name}": component.config for (_, name), component in plan.components.items()}
    parts |= {f"attacks.{name}": config for name, _, config in plan.attacks}
    names = plan.config.model_dump(include={"method", "backbone", "task", "seed", "limit"})
    images, known, whole = _images(plan), earlier(out, plan), cost(plan, out, anew=anew)
    drawing = _about([images * seconds for seconds in known.image], whole.image_s and images * whole.image_s)
    stages = {
        "load": f"{plan.backbone.weights_gb(plan.backbone_config):.2f} GB of weights at once",
        "base_images": f"{images} images, {plan.protocol.steps} steps each{drawing}; fewer if another run drew them",
        "erase": _erasing(plan, whole, _about(known.erase, whole.erase_s)),
        "sample": f"{images} images{drawing}",
        "evaluate": ", ".join(plan.task.evaluators),
        "together": _together(whole),
    }
    if plan.attacks:
        stages["attack"] = ", ".join(name for name, _, _ in plan.attacks)
    if plan.backbone.domain == "natural":
        stages["memory"] = _memory(plan.singles()[0] if plan.separate else plan)
    runs = {str(path_of(out, p)): [c.name for c in p.concepts] for p in (plan.singles() if plan.separate else [plan])}
    if as_json:
        settings = {part: values.model_dump(mode="json") for part, values in parts.items()}
        put_json({**names, "options": settings, "stages": stages, "cost": whole._asdict(), "runs": runs})
        return
    rows = [[name, str(value), RunConfig.model_fields[name].description or ""] for name, value in names.items()]
    for part, values in parts.items():
        fields = type(values).model_fields
        rows += [[f"{part}.{k}", str(v), fields[k].description or ""] for k, v in values.model_dump(mode="json").items()]
    show(["setting", "value", "meaning"], rows)
    show(["stage", "of each run"], [list(row) for row in stages.items()])
    show(["run", "concepts"], [[path, ", ".join(concepts)] for path, concepts in runs.items()])


def _memory(plan: Plan) -> str:
    """The predicted peak."""
    from erasekit.runs.preflight import prediction

    found = prediction(plan)
    stages = ", ".join(f"{stage} {gb:.1f}" for stage, gb in found._asdict().items())
    return f"predicted peak {found.peak:.1f} GB ({stages})"


def _about(seconds: list[float], estimate: float | None) -> str:
    """The median of what runs took, in words, or an estimate; nothing is guessed without either."""
    if seconds:
        return f", about {median(seconds):.0f} s (as {len(seconds)} earlier runs here)"
    return ", time unknown (no such run here yet)" if estimate is None else f", about {duration(estimate)} (an estimate)"


def _erasing(plan: Plan, whole: Cost, about: str) -> str:
    """What computing the erasures takes, and how many need not be computed."""
    runs = len(plan.concepts) if plan.separate else 1
    if whole.taken == runs:
        return "nothing: an earlier run has the erasure, which is taken unless --force is given"
    some = f"; {whole.taken} of {runs} erasures are taken from earlier runs, unless --force is given" if whole.taken else ""
    return f"{getattr(plan.method_config, 'steps', 0)} training steps{about}{some}"


def _together(whole: Cost) -> str:
    """What all runs take."""
    time = "time unknown" if whole.hours is None else f"about {duration(3600 * whole.hours)} without judging ({whole.basis})"
    disk = f"{whole.disk_gb:.1f} GB of disk at most" + (
        f", {whole.download_gb:.0f} GB to download" if whole.download_gb else ""
    )
    return f"{whole.base_images} + {whole.erased_images} images, {whole.passes:,.0f} passes, {time}, {disk}"


def _images(plan: Plan) -> int:
    """How many images a run of the plan draws of each side."""
    from erasekit.runs.ready import evaluation_prompts

    return len(evaluation_prompts(plan.singles()[0] if plan.separate else plan))


def show_results(plan: Plan, out: Path) -> None:
    """Print the numbers of a finished plan, where its report is, and how to load its erasure in diffusers."""
    from erasekit.erasures.erasure import Erasure
    from erasekit.erasures.manifest import read_manifest
    from erasekit.erasures.modelcard import load_lines
    from erasekit.evaluation.results import number, read_result, read_scores, table
    from erasekit.runs.pages.gallery import lead, pairs_of, things

    folder = path_of(out, plan)
    result = read_result(folder / "results.json")
    title = f"{plan.task.title or plan.task.name}: {plan.config.method} on {plan.config.backbone}"
    if plan.separate:
        singles = [(p.concepts[0].name, read_result(path_of(out, p) / "results.json")) for p in plan.singles()]
        rows = [[name, *(number(r.metrics[m].value) for m in result.metrics)] for name, r in singles]
        show(["concept", *result.metrics], rows, title=title)
    heading = "mean over the concepts" if plan.separate else f"{title}, erased: {', '.join(result.concepts)}"
    if result.metrics:
        show(*table(result), title=heading, spare=("evaluator", "better"))
    else:
        put(f"{heading}. Nothing judged the images: look at them.")
    runs = [path_of(out, p) for p in (plan.singles() if plan.separate else [plan])]
    found = things([pair for run in runs for pair in pairs_of(read_scores(run / "scores.parquet"))])
    told = ["", *lead(found, result.concepts)]
    if plan.separate:
        put("\n".join([*told, *(f"Report: {run / 'report.html'}" for run in runs)]))
        return
    tell(Erasure.load(folder / "erasure"))
    base = plan.backbone_config.path or getattr(plan.backbone, "path", "")
    lines = load_lines(read_manifest(folder / "erasure"), str(folder / "erasure"), base=base)
    put("\n".join([*told, f"Report: {folder / 'report.html'}", "", lines.rstrip()]))
