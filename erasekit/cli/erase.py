"""`erasekit erase`: compute an erasure and save it, without measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import options
from erasekit.cli.progress import listener
from erasekit.config import build, resolve
from erasekit.errors import UsageError
from erasekit.events import StageStarted, StepEnd


def command(
    method: options.Method = None,
    backbone: options.Backbone = None,
    task: options.Task = None,
    concept: options.Concept = None,
    seed: options.Seed = None,
    preset: options.Preset = None,
    config: options.Config = None,
    settings: options.Set = None,
    vram: options.Vram = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the erasure is written.")] = Path("erasure"),
    force: Annotated[bool, typer.Option("--force", help="Replace an erasure that is there.")] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Compute the erasure of one or several concepts together and write it to a folder."""
    flags = {"method": method, "backbone": backbone, "task": task, "concepts": tuple(concept or ())}
    wanted = build(flags | {"seed": seed, "preset": preset}, file=config, overrides=options.overrides(settings, vram))
    registries = options.registries(plugin)
    plan = resolve(wanted, registries)
    if plan.separate:
        raise UsageError(f"Say what to erase, e.g. --concept '{plan.concepts[0].name}'.")
    if out.exists() and not force:
        raise UsageError(f"'{out}' exists. Give another folder with --out, or --force to replace it.")
    from erasekit.erasure import read_manifest
    from erasekit.memory import check_disk
    from erasekit.modelcard import model_card
    from erasekit.preflight import preflight
    from erasekit.runner import compute

    preflight(plan)
    check_disk(out, pictures=0, size=0)
    with listener() as told:
        told(StageStarted("erase"))
        loaded = plan.backbone.load(plan.backbone_config)
        erasure = compute(plan, loaded, registries, log=lambda step, total, values: told(StepEnd(step, total, values)))
    sha256 = erasure.save(out)
    (out / "README.md").write_text(model_card(read_manifest(out)), encoding="utf-8")
    summary = {"erasure": str(out), "concepts": [c.name for c in plan.concepts], "sha256": sha256}
    typer.echo(json.dumps(summary, indent=1) if as_json else f"{out}  {', '.join(summary['concepts'])}  {sha256[:8]}")
