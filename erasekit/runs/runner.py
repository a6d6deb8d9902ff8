"""One run, from a configuration to a report: ten steps in a row, each a function of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from erasekit.atomic import replacing
from erasekit.backbones.memory import peak_memory_mb, reset_peak
from erasekit.backbones.protocol import Backbone
from erasekit.erasures.certificate import certify, content_of
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.manifest import MANIFEST, read_manifest
from erasekit.erasures.modelcard import model_card
from erasekit.evaluation.curves import INTERFERENCE, Interference
from erasekit.evaluation.evaluate import Evaluation, evaluate
from erasekit.evaluation.evaluators import Evaluator
from erasekit.evaluation.kept_scores import KeptScores
from erasekit.evaluation.results import ATTACKS_HASH, RunResult, mean_over_concepts, read_result, write_result, write_scores
from erasekit.events import (
    Dispatcher,
    Evaluated,
    Listener,
    RunFailed,
    RunFinished,
    RunStarted,
    Saved,
    StageStarted,
    StepEnd,
    heard,
)
from erasekit.places import check_place
from erasekit.processes import here
from erasekit.registration.plugins import Registries, default
from erasekit.runs.assisting import assist
from erasekit.runs.attacking import Stage, attack_texts
from erasekit.runs.compute import compute, context, expect, named
from erasekit.runs.config import RunConfig
from erasekit.runs.current import Run
from erasekit.runs.drawing import base_images, erased_images
from erasekit.runs.kept import Kept
from erasekit.runs.offers import taken
from erasekit.runs.packages import check_packages
from erasekit.runs.pages.report import write_report
from erasekit.runs.plan import Plan
from erasekit.runs.preflight import check_tracker
from erasekit.runs.ready import evaluation_prompts, ready
from erasekit.runs.resolve import resolve
from erasekit.runs.room import check_room
from erasekit.runs.rundir import RunDirectory, open_run, write_json
from erasekit.runs.taking import alone, copy_whole, note_computed, take
from erasekit.runs.watching import watch

TIMED = ("load", "encode", "base_images", "erase", "sample", "evaluate")


def run(
    config: RunConfig,
    *,
    out: str | Path = "runs",
    force: bool = False,
    listener: Listener | None = None,
    registries: Registries | None = None,
    erasure: str | Path | None = None,
    kept: Kept | None = None,
    only_attacks: bool = False,
) -> RunResult:
    """Erase, sample, measure and report; what an earlier attempt finished is not done again.

    Without concepts in `config`, each concept of the task is a run of its own, and the result is their mean.

    Args:
        config: what to do.
        out: where runs are kept, as `<backbone>/<task>/<method>/<hash>/`.
        force: begin anew, even if the run is finished, and compute the erasure, even if another run has it.
        listener: is told every event.
        registries: what names stand for; what is installed, if left out.
        erasure: measure this one instead of computing it.
        kept: the model that an earlier run has loaded, and the place where this one leaves its own.
        only_attacks: measure nothing but the attacks of `config` on it.

    Raises:
        UsageError: something in the configuration is wrong; lists every mistake.
        EnvironmentProblem: weights, memory or disk are missing.
        ErasekitError: the run failed; the same call goes on from what was finished.
    """
    out, erasure, registries, kept = Path(out), Path(erasure) if erasure else None, registries or default(), kept or Kept()
    plan = planned(config, registries, erasure=erasure, only_attacks=only_attacks)
    check_place(out)
    if plan.separate:
        return _run_each(plan, out, force=force, listener=listener, registries=registries, kept=kept)
    if not here().first:
        return assist(plan, out, registries, kept)
    check_tracker(plan.config.tracker)
    with open_run(out, plan, force=force) as directory:
        if here().says(directory.state == "finished"):
            return read_result(directory.path / "results.json")
        this = Run(plan, registries, directory, Dispatcher(registries.manager, directory, listener))
        reset_peak()
        with _announced(this):
            result = stages(this, out, kept, given=erasure, anew=force)
            here().wait()
    return result


def stages(this: Run, out: Path, kept: Kept, *, given: Path | None, anew: bool) -> RunResult:
    """Everything that a run does, in its order; a stage that is finished finds its work done."""
    plan, registries, cache = this.plan, this.registries, out / "cache"
    check_packages(plan, registries)
    evaluators = ready(plan, this.prompts, out, registries)
    with _stage("load", this):
        backbone = kept.load(plan)
    with _stage("encode", this):
        backbone.encode(["", *(p.text for p in this.prompts), *attack_texts(plan, registries)])
        expect(plan, context(plan, backbone, registries))
    with _stage("base_images", this):
        base = base_images(this, backbone, cache=cache)
    with _stage("erase", this):
        sha256 = erase(this, backbone, out, given=given, anew=anew)
    with _stage("certify", this):
        write_certificate(this, backbone)
    with _stage("sample", this):
        erased = erased_images(this, backbone, sha256, cache=cache)
    with _stage("evaluate", this):
        if not all(path.is_file() for path in base):  # somebody has cleared the folder meanwhile
            base = base_images(this, backbone, cache=cache, alone=True)
        if not all(path.is_file() for path in erased):
            erased = erased_images(this, backbone, sha256, cache=cache, alone=True)
        said = KeptScores(cache / "scores")
        evaluation = evaluate(plan.task, evaluators, this.prompts, base, erased, concepts=plan.concepts, kept=said)
    if plan.attacks:
        with _stage("attack", this):
            evaluation = attacked(this, backbone, evaluators, evaluation, cache=cache)
    result = record(this, evaluators, evaluation, sha256)
    this.emit(Evaluated({name: m.model_dump() for name, m in result.metrics.items()}))
    with _stage("report", this):
        report(this, result)
    return result


def planned(config: RunConfig, registries: Registries, *, erasure: Path | None = None, only_attacks: bool = False) -> Plan:
    """The plan of a configuration; of an erasure that exists, all its concepts together."""
    if erasure is None:
        return resolve(config, registries)
    manifest = read_manifest(erasure)
    plan = resolve(config, registries, given=manifest)
    return replace(plan, erasure_sha256=manifest["erasure_sha256"], separate=False, only_attacks=only_attacks)


def _run_each(plan: Plan, out: Path, *, registries: Registries, **how: Any) -> RunResult:
    """A run per concept, the model loaded once for all, and their mean in a directory of its own."""
    check_room([(each, evaluation_prompts(each)) for each in plan.singles()], out)
    results = [run(p.config, out=out, registries=registries, **how) for p in plan.singles()]
    mean = mean_over_concepts(results).model_copy(update={"config_hash": plan.hash})
    if here().first:
        with open_run(out, plan, force=how["force"]) as directory:
            write_result(mean, directory.path / "results.json")
            directory.write_status("finished")
    return mean


@contextmanager
def _announced(this: Run) -> Iterator[None]:
    """Tell everybody that a run begins, and how it ends."""
    plan, directory, emit = this.plan, this.directory, this.emit
    config, names = plan.config, tuple(c.name for c in plan.concepts)
    what = (config.method, config.backbone, plan.task_name, names, plan.hash)
    emit(RunStarted(*what, directory.state == "partial", config.tracker, plan.settings()))
    try:
        with heard(emit):
            yield
    except KeyboardInterrupt:  # somebody wants it to stop: that is no sign of a run that ends its process
        directory.starts -= 1
        directory.write_status("running")
        raise
    except (Exception, SystemExit) as error:  # a plugin may call sys.exit, which is an error of its own
        shown = named(error, plan)
        with suppress(OSError):  # the disk may be full; the error that matters is the first one
            directory.write_status("failed", str(shown))
            emit(RunFailed(str(shown)))
        if shown is error:
            raise
        raise shown from error
    directory.write_status("finished")
    emit(RunFinished(directory.path))


@contextmanager
def _stage(name: str, this: Run) -> Iterator[None]:
    this.emit(StageStarted(name))
    with this.directory.stage(name):
        yield


def erase(this: Run, backbone: Backbone, out: Path, *, given: Path | None = None, anew: bool = False) -> str:
    """Compute the erasure and save it, unless the run has it already, it is given, or another run under `out` has it.

    Args:
        this: the run.
        backbone: the model.
        out: where other runs are.
        given: the erasure to take.
        anew: take none from another run.

    Returns:
        The erasure's sha256.
    """
    folder = this.directory.path / "erasure"
    if given is not None and not (folder / MANIFEST).is_file():
        copy_whole(given, folder, backbone)
    may_take = not (anew or (folder / MANIFEST).is_file())
    with alone(this) if may_take else nullcontext():
        if may_take:
            take(this, backbone, out)
        if not here().says((folder / MANIFEST).is_file()):
            _compute(this, backbone, folder)
    here().wait()
    record = read_manifest(folder, backbone)
    sha256: str = record["erasure_sha256"]
    if measured := record["figures"].get("interference"):  # of erasures that were put together
        Interference.model_validate(measured).write(this.directory.path / INTERFERENCE)
    this.emit(Saved(folder, sha256))
    return sha256


def _compute(this: Run, backbone: Backbone, folder: Path) -> None:
    """Compute the erasure and save it."""

    def log(step: int, total: int, values: Mapping[str, float]) -> None:
        this.emit(StepEnd(step, total, dict(values)))

    start, path = time.monotonic(), this.directory.path
    watching = partial(watch, this.plan, this.directory, this.emit, this.prompts)
    erasure = compute(this.plan, backbone, this.registries, directory=path, log=log, watching=watching)
    sha256 = erasure.save(folder, dtype=this.plan.config.files)
    note_computed(this, sha256, time.monotonic() - start)


def write_certificate(this: Run, backbone: Backbone) -> None:
    """Write certificate.json: what the theory says of the erasure, measured on its weights, if it changes any."""
    path, erasure = this.directory.path / "certificate.json", Erasure.load(this.directory.path / "erasure")
    if erasure.kind == "weights" and not content_of(path):
        write_json(path, certify(backbone, erasure, this.plan.task, this.plan.protocol))


def attacked(
    this: Run, backbone: Backbone, evaluators: Sequence[Evaluator], evaluation: Evaluation, *, cache: Path
) -> Evaluation:
    """The evaluation, and the numbers of the plan's attacks."""
    prompts = [p for p in this.prompts if p.set == "erase"]
    where = (this.directory.path, cache)
    found = Stage(this.plan, this.registries, backbone, evaluators, prompts, evaluation.rows, *where).run()
    return evaluation._replace(metrics=evaluation.metrics | found)


def record(this: Run, evaluators: Sequence[Evaluator], evaluation: Evaluation, sha256: str) -> RunResult:
    """Write scores.parquet and results.json."""
    plan, directory = this.plan, this.directory
    config, judges = plan.config, {e.name: e.describe() for e in evaluators}
    measured_on = (plan.task.name, plan.task.version, this.prompts, judges)
    hashes: dict[str, Any] = {"hash": plan.protocol.hash(*measured_on)}
    if plan.attacks:  # what they may spend decides their numbers, and no others
        own = [p for p in this.prompts if p.set == "erase"]
        hashes[ATTACKS_HASH] = plan.protocol.hash(*measured_on[:2], own, judges, plan.budgets())
        hashes["attacks"] = {name: settings for name, _, settings in plan.budgets()}
    given = [key for key in ("guidance", "width", "height") if any(getattr(p, key) is not None for p in this.prompts)]
    if given:  # prompts have their own
        hashes["own"] = given
    seconds, peak = _cost(directory, sha256)
    result = RunResult(
        method=config.method,
        backbone=config.backbone,
        task=plan.task_name,
        domain=plan.task.domain,
        concepts=tuple(c.name for c in plan.concepts),
        seed=config.seed,
        config_hash=plan.hash,
        protocol=plan.protocol.model_dump() | plan.task.describe() | {"evaluators": judges} | hashes,
        counts=evaluation.counts,
        metrics=evaluation.metrics,
        timings_s={stage: seconds.get(stage, 0.0) for stage in (*TIMED, *(["attack"] if plan.attacks else []))},
        peak_memory_mb=round(peak, 1),
        erasure_sha256=sha256,
        warnings=(*read_manifest(directory.path / "erasure").get("warnings", ()), *plan.task.notes()),
    )
    write_scores(evaluation.rows, directory.path / "scores.parquet")
    write_result(result, directory.path / "results.json")
    return result


def _cost(directory: RunDirectory, sha256: str) -> tuple[dict[str, float], float]:
    """Seconds of each stage and the peak of memory: of an erasure that was taken, what computing it took where it was made."""
    if (made := taken(directory.path, sha256)) is None:
        return directory.timings_s, peak_memory_mb()
    return directory.timings_s | {"erase": made.erase_s}, max(peak_memory_mb(), made.peak_memory_mb)


def report(this: Run, result: RunResult) -> None:
    """Write the report and the erasure's model card."""
    folder = this.directory.path / "erasure"
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(model_card(read_manifest(folder), result), encoding="utf-8")
    write_report(this.directory.path, this.plan.task, meanings=this.plan.method.curves)
