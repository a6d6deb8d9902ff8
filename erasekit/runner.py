"""One run, from a configuration to a report: ten steps in a row, each a function of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erasekit.atomic import linked, replacing
from erasekit.backbone import Backbone, Conditioning
from erasekit.certificate import certify
from erasekit.certificate import texts as certificate_texts
from erasekit.config import Plan, RunConfig, resolve
from erasekit.erasure import MANIFEST, Erasure, load_into, read_manifest
from erasekit.evaluate import Evaluation, evaluate
from erasekit.evaluators import Evaluator
from erasekit.events import (
    Dispatcher,
    Evaluated,
    Listener,
    RunFailed,
    RunFinished,
    RunStarted,
    Sampled,
    Saved,
    StageStarted,
    StepEnd,
    heard,
)
from erasekit.memory import check_disk, out_of_memory, peak_memory_mb, vram_gb
from erasekit.method import RunContext
from erasekit.modelcard import model_card
from erasekit.plugins import Registries, default
from erasekit.preflight import preflight
from erasekit.report import write_report
from erasekit.results import RunResult, mean_over_concepts, read_result, write_result, write_scores
from erasekit.rundir import RunDirectory, open_run, write_json
from erasekit.safety import reject_unsafe
from erasekit.sampling import base_key, sample
from erasekit.tasks import Prompt
from erasekit.validation import remains_of

SETS = ("erase", "synonyms", "preserve", "clean", "pairs")
TIMED = ("load", "encode", "base_images", "erase", "sample", "evaluate")


def run(
    config: RunConfig,
    *,
    out: str | Path = "runs",
    force: bool = False,
    listener: Listener | None = None,
    registries: Registries | None = None,
    erasure: Path | None = None,
) -> RunResult:
    """Erase, sample, measure and report; what an earlier attempt finished is not done again.

    Without concepts in `config`, each concept of the task is a run of its own, and the result is their mean.

    Args:
        config: what to do.
        out: where runs are kept, as `<backbone>/<task>/<method>/<hash>/`.
        force: begin anew, even if the run is finished.
        listener: is told every event.
        registries: what names stand for; what is installed, if left out.
        erasure: measure this one instead of computing it.

    Raises:
        UsageError: something in the configuration is wrong; lists every mistake.
        EnvironmentProblem: weights, memory or disk are missing.
        ErasekitError: the run failed; the same call goes on from what was finished.
    """
    out, registries = Path(out), registries or default()
    plan = planned(config, registries, erasure=erasure)
    if plan.separate:
        return _run_each(plan, out, force=force, listener=listener, registries=registries)
    with open_run(out, plan, force=force) as directory:
        if directory.state == "finished":
            return read_result(directory.path / "results.json")
        emit = Dispatcher(registries.manager, directory, listener)
        with _announced(plan, directory, emit):
            prompts = evaluation_prompts(plan)
            if erasure is None:
                preflight(plan)
            check_disk(directory.path, pictures=2 * len(prompts), size=plan.protocol.size)
            evaluators = [registries.evaluators.get(name)() for name in plan.task.evaluators]  # what they lack shows now
            with _stage("load", directory, emit):
                backbone = plan.backbone.load(plan.backbone_config)
            with _stage("encode", directory, emit):
                encoded, empty = backbone.encode([p.text for p in prompts]), backbone.encode([""])
                _expect(plan, context(plan, backbone, registries))
            with _stage("base_images", directory, emit):
                base = base_images(plan, backbone, prompts, encoded, empty, directory, out / "cache" / "base", emit)
            with _stage("erase", directory, emit):
                sha256 = erase(plan, backbone, registries, directory, emit, given=erasure)
            with _stage("certify", directory, emit):
                write_certificate(plan, backbone, directory)
            with _stage("sample", directory, emit):
                erased = erased_images(plan, backbone, registries, prompts, encoded, empty, directory, emit)
            with _stage("evaluate", directory, emit):
                evaluation = evaluate(plan.task, evaluators, prompts, base, erased, concepts=plan.concepts)
            result = record(plan, prompts, evaluators, evaluation, directory, sha256)
            emit(Evaluated({name: m.model_dump() for name, m in result.metrics.items()}))
            with _stage("report", directory, emit):
                report(plan, result, directory)
    return result


def planned(config: RunConfig, registries: Registries, *, erasure: Path | None = None) -> Plan:
    """The plan of a configuration; of an erasure that exists, all its concepts together."""
    plan = resolve(config, registries)
    if erasure is None:
        return plan
    return replace(plan, erasure_sha256=read_manifest(erasure)["erasure_sha256"], separate=False)


def _run_each(plan: Plan, out: Path, *, force: bool, listener: Listener | None, registries: Registries) -> RunResult:
    """A run per concept, and their mean in a directory of its own."""
    results = [run(p.config, out=out, force=force, listener=listener, registries=registries) for p in plan.singles()]
    mean = mean_over_concepts(results).model_copy(update={"config_hash": plan.hash})
    with open_run(out, plan, force=force) as directory:
        write_result(mean, directory.path / "results.json")
        directory.write_status("finished")
    return mean


@contextmanager
def _announced(plan: Plan, directory: RunDirectory, emit: Dispatcher) -> Iterator[None]:
    """Tell everybody that a run begins, and how it ends."""
    names = tuple(c.name for c in plan.concepts)
    config = plan.config
    emit(RunStarted(config.method, config.backbone, config.task, names, plan.hash, resumed=directory.state == "partial"))
    try:
        with heard(emit):
            yield
    except Exception as error:
        named = _named(error, plan)
        with suppress(OSError):  # the disk may be full; the error that matters is the first one
            directory.write_status("failed", str(named))
            emit(RunFailed(str(named)))
        if named is error:
            raise
        raise named from error
    directory.write_status("finished")
    emit(RunFinished(directory.path))


def _named(error: Exception, plan: Plan) -> Exception:
    """The error that a user is shown: one that says which way is out, where there is one."""
    if isinstance(error, torch.OutOfMemoryError):
        return out_of_memory(error, vram_gb(plan.backbone_config.vram, torch.device("cuda")))
    return error


@contextmanager
def _stage(name: str, directory: RunDirectory, emit: Dispatcher) -> Iterator[None]:
    emit(StageStarted(name))
    with directory.stage(name):
        yield


def evaluation_prompts(plan: Plan) -> list[Prompt]:
    """The prompts that are measured on, all sets one after the other.

    Raises:
        UsageError: a prompt is one that erasekit refuses to draw.
    """
    prompts = [p for which in SETS for p in plan.task.prompts(which, plan.concepts, "evaluation", plan.config.limit)]
    reject_unsafe(p.text for p in prompts)
    return prompts


def _drawn(which: str, emit: Dispatcher) -> Callable[[int, int], None]:
    return lambda done, total: emit(Sampled(which, done, total))


def base_images(
    plan: Plan,
    backbone: Backbone,
    prompts: Sequence[Prompt],
    encoded: Conditioning,
    empty: Conditioning,
    directory: RunDirectory,
    cache: Path,
    emit: Dispatcher,
) -> list[Path]:
    """Pictures of the unedited model. Every method is compared with the same ones: kept in `cache`, linked into the run."""
    folder = cache / base_key(backbone, plan.protocol, prompts)
    pipe = backbone.pipeline(encoders=False, shared=True)
    cached = sample(backbone, pipe, prompts, encoded, empty, plan.protocol, folder, on_batch=_drawn("base", emit))
    return [linked(path, directory.path / "images" / "base" / path.name) for path in cached]


def erase(
    plan: Plan,
    backbone: Backbone,
    registries: Registries,
    directory: RunDirectory,
    emit: Dispatcher,
    *,
    given: Path | None = None,
) -> str:
    """Compute the erasure (or take the one that is given) and save it, unless the run has it already; its sha256."""
    folder = directory.path / "erasure"
    if not (folder / MANIFEST).is_file():
        if given is None:
            compute(plan, backbone, registries, directory=directory.path, log=_logger(emit)).save(
                folder, dtype=plan.config.files
            )
        else:
            _copy(given, folder, backbone)
    sha256: str = read_manifest(folder, backbone)["erasure_sha256"]
    emit(Saved(folder, sha256))
    return sha256


def _copy(given: Path, folder: Path, backbone: Backbone) -> None:
    """Copy an erasure, checked, so that it is there whole or not at all."""
    Erasure.load(given, backbone)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(given, partial)
    partial.rename(folder)


def _logger(emit: Dispatcher) -> Callable[[int, int, Mapping[str, float]], None]:
    return lambda step, total, values: emit(StepEnd(step, total, dict(values)))


def compute(
    plan: Plan,
    backbone: Backbone,
    registries: Registries,
    *,
    directory: Path | None = None,
    log: Callable[[int, int, Mapping[str, float]], None] = lambda step, total, values: None,
) -> Erasure:
    """The method's own work: the erasure of the plan's concepts.

    Raises:
        EnvironmentProblem: the GPU ran out of memory.
    """
    torch.manual_seed(plan.config.seed)  # methods name their generators; this is for libraries that draw from the global one
    ctx = context(plan, backbone, registries, directory=directory, log=log)
    _expect(plan, ctx)
    try:
        erasure = plan.method(plan.method_config).erase(ctx)
        remains = remains_of(ctx, erasure) if _predicts(plan, backbone) else None
    except torch.OutOfMemoryError as error:
        raise _named(error, plan) from error
    left = remains.warnings() if remains else []
    return replace(erasure, remains=remains, warnings=(*ctx.warnings, *left))


def _predicts(plan: Plan, backbone: Backbone) -> bool:
    """Whether the erasure is measured by predictions: not a closed form of a large model on a CPU, which would take hours."""
    slow = backbone.device.type == "cpu" and plan.backbone.weights_gb(plan.backbone_config) > 1
    return not slow or getattr(plan.method_config, "steps", 0) > 0


def context(plan: Plan, backbone: Backbone, registries: Registries, **more: Any) -> RunContext:
    """What the plan's method is handed; `more` are the directory and the log of a run."""
    return RunContext(
        backbone=backbone,
        concepts=plan.concepts,
        task=plan.task,
        protocol=plan.protocol,
        seed=plan.config.seed,
        component=registries.components.get,
        **more,
    )


def _expect(plan: Plan, ctx: RunContext) -> None:
    """Tell the backbone all that the method and the certificate will ask for, before the encoders may have to go."""
    method = plan.method(plan.method_config)
    ctx.backbone.expect(lambda: [*method.texts(ctx), *certificate_texts(plan.concepts, plan.task)])


def write_certificate(plan: Plan, backbone: Backbone, directory: RunDirectory) -> None:
    """Write certificate.json: what the theory says of the erasure, measured on its weights, if it changes any."""
    path, erasure = directory.path / "certificate.json", Erasure.load(directory.path / "erasure")
    if erasure.kind == "weights" and not path.is_file():
        write_json(path, certify(backbone, erasure, plan.task, plan.protocol))


def erased_images(
    plan: Plan,
    backbone: Backbone,
    registries: Registries,
    prompts: Sequence[Prompt],
    encoded: Conditioning,
    empty: Conditioning,
    directory: RunDirectory,
    emit: Dispatcher,
) -> list[Path]:
    """The same prompts and seeds, drawn by a fresh pipeline that has loaded the files of the erasure.

    Its denoiser is the backbone's, every bit of it as it was loaded.
    """
    if not backbone.unchanged():  # a method left something on it
        backbone.release("denoiser")
    pipe = backbone.pipeline(encoders=False, shared=True)
    load_into(pipe, directory.path / "erasure", base=backbone, component=registries.components.get)
    folder = directory.path / "images" / "erased"
    return sample(backbone, pipe, prompts, encoded, empty, plan.protocol, folder, on_batch=_drawn("erased", emit))


def record(
    plan: Plan,
    prompts: Sequence[Prompt],
    evaluators: Sequence[Evaluator],
    evaluation: Evaluation,
    directory: RunDirectory,
    sha256: str,
) -> RunResult:
    """Write scores.parquet and results.json."""
    config = plan.config
    judges = {e.name: e.describe() for e in evaluators}
    measured_on = plan.protocol.hash(plan.task.name, plan.task.version, prompts, judges)
    result = RunResult(
        method=config.method,
        backbone=config.backbone,
        task=config.task,
        domain=plan.task.domain,
        concepts=tuple(c.name for c in plan.concepts),
        seed=config.seed,
        config_hash=plan.hash,
        protocol=plan.protocol.model_dump() | {"evaluators": judges, "hash": measured_on},
        counts=evaluation.counts,
        metrics=evaluation.metrics,
        timings_s={stage: directory.timings_s.get(stage, 0.0) for stage in TIMED},
        peak_memory_mb=round(peak_memory_mb(), 1),
        erasure_sha256=sha256,
        warnings=tuple(read_manifest(directory.path / "erasure").get("warnings", ())),
    )
    write_scores(evaluation.rows, directory.path / "scores.parquet")
    write_result(result, directory.path / "results.json")
    return result


def report(plan: Plan, result: RunResult, directory: RunDirectory) -> None:
    """Write the report and the erasure's model card."""
    folder = directory.path / "erasure"
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(model_card(read_manifest(folder), result), encoding="utf-8")
    write_report(directory.path, plan.task)
