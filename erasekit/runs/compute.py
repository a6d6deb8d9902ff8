"""The method's own work in a run: from a plan and a loaded model to an erasure in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erasekit.backbones.memory import out_of_memory, vram_gb
from erasekit.backbones.protocol import Backbone
from erasekit.erasures.certificate import texts as certificate_texts
from erasekit.erasures.erasure import Erasure
from erasekit.errors import ErasekitError
from erasekit.methods.context import RunContext
from erasekit.methods.validation import remains_of
from erasekit.registration.plugins import Registries
from erasekit.runs.plan import Plan
from erasekit.runs.preflight import UNVALIDATED_GB
from erasekit.runs.watching import wanted, watched_prompts


def compute(
    plan: Plan,
    backbone: Backbone,
    registries: Registries,
    *,
    directory: Path | None = None,
    log: Callable[[int, int, Mapping[str, float]], None] = lambda step, total, values: None,
    watching: Callable[[RunContext], Any] | None = None,
) -> Erasure:
    """The method's own work: the erasure of the plan's concepts.

    Args:
        plan: what is erased, and how.
        backbone: from what.
        registries: what names stand for.
        directory: of the run, where there is one.
        log: called once per training step.
        watching: makes of the context what watches the training (`RunContext.watch`).

    Raises:
        EnvironmentProblem: the GPU ran out of memory.
        ErasekitError: the method gives no erasure.
    """
    torch.manual_seed(plan.config.seed)  # methods name their generators; this is for libraries that draw from the global one
    ctx = context(plan, backbone, registries, directory=directory, log=log)
    expect(plan, ctx)
    if watching is not None and wanted(plan):
        ctx.watch = watching(ctx)
    try:
        erasure: Any = plan.method(plan.method_config).erase(ctx)
        if not isinstance(erasure, Erasure):
            line = f"Method '{plan.config.method}' returns {type(erasure).__name__} from 'erase', not an Erasure"
            raise ErasekitError(f"{line}. End it with 'return self.erasure(ctx, deltas=...)'.")
        remains = remains_of(ctx, erasure) if _predicts(plan, backbone) else None
    except torch.OutOfMemoryError as error:
        raise named(error, plan) from error
    left = remains.warnings() if remains else []
    return replace(erasure, remains=remains, warnings=(*ctx.warnings, *left))


def _predicts(plan: Plan, backbone: Backbone) -> bool:
    """Whether the erasure is measured by predictions: not a closed form of a large model on a CPU, which would take hours."""
    slow = backbone.device.type == "cpu" and plan.backbone.weights_gb(plan.backbone_config) > UNVALIDATED_GB
    return not slow or getattr(plan.method_config, "steps", 0) > 0


def context(plan: Plan, backbone: Backbone, registries: Registries, **more: Any) -> RunContext:
    """What the plan's method is handed; `more` are the directory and the log of a run."""

    def component(slot: str, name: str) -> Any:
        return plan.components.get((slot, name)) or registries.components.get(slot, name)

    return RunContext(
        backbone=backbone,
        concepts=plan.concepts,
        task=plan.task,
        protocol=plan.protocol,
        seed=plan.config.seed,
        component=component,
        **more,
    )


def expect(plan: Plan, ctx: RunContext) -> None:
    """Tell the backbone all that the method and the certificate will ask for, before the encoders may have to go."""
    method = plan.method(plan.method_config)
    seen = [p.text for p in watched_prompts(ctx)] if wanted(plan) else []
    ctx.backbone.expect(lambda: [*method.texts(ctx), *certificate_texts(plan.concepts, plan.task), *seen])


def named(error: BaseException, plan: Plan) -> BaseException:
    """The error that a user is shown: one that says which way is out, where there is one."""
    if isinstance(error, torch.OutOfMemoryError):
        return out_of_memory(error, vram_gb(plan.backbone_config.vram, torch.device("cuda")))
    if isinstance(error, SystemExit):
        return ErasekitError(f"A plugin called sys.exit({error.code!r}) in the midst of the run.")
    return error
