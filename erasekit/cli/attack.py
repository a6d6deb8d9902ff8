"""`erasekit attack`: try to bring an erased concept back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import options
from erasekit.cli.ends import put, put_json, say
from erasekit.cli.evaluate import of_manifest
from erasekit.cli.progress import listener
from erasekit.cli.tables import show
from erasekit.errors import UsageError
from erasekit.runs.config import build
from erasekit.runs.rundir import path_of

KEPT = "What was finished is kept: the same command goes on with the next prompt."


def command(
    erasure: Annotated[Path, typer.Argument(help="The folder of an erasure.", show_default=False)],
    attack: options.Attack = None,
    task: options.Task = None,
    seed: options.Seed = None,
    limit: options.Limit = None,
    keep_texts: options.KeepTexts = False,
    settings: options.Set = None,
    vram: options.Vram = None,
    out: options.Out = Path("runs"),
    force: Annotated[bool, typer.Option("--force", help="Attack again, even if the run is finished.")] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Try attacks on an erasure, and beside it on the unedited model and on a concept that no model has learned.

    The same command goes on with the next prompt where it was stopped.
    """
    from erasekit.erasures.manifest import read_manifest
    from erasekit.evaluation.results import table
    from erasekit.runs.runner import planned, run

    if not attack:
        raise UsageError("Say what to try, e.g. --attack unlearndiff. See 'erasekit ls attacks'.")
    flags = of_manifest(read_manifest(erasure)) | {"task": task, "seed": seed, "limit": limit}
    flags |= {"attacks": tuple(attack), "keep_texts": keep_texts or None}
    wanted = build(flags, overrides=options.overrides(settings, vram))
    registries = options.registries(plugin)
    with listener() as told:
        result = run(wanted, out=out, force=force, listener=told, registries=registries, erasure=erasure, only_attacks=True)
    if not told.started:
        say("Finished before: these are its numbers. Begin anew with --force.")
    if as_json:
        put_json(result.model_dump(mode="json"))
        return
    plan = planned(wanted, registries, erasure=erasure, only_attacks=True)
    show(
        *table(result),
        title=f"Attacks on {', '.join(result.concepts)}, erased by {result.method} from {result.backbone}",
        spare=("evaluator", "better"),
    )
    put(f"\nReport: {path_of(out, plan) / 'report.html'}")
