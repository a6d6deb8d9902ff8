"""`erasekit erase`: compute an erasure and save it, without measuring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from erasekit.atomic import sweep_beside
from erasekit.cli import options
from erasekit.cli.ends import put, put_json, say
from erasekit.cli.progress import listener
from erasekit.cli.tables import tell
from erasekit.errors import UsageError
from erasekit.events import StageStarted, StepEnd, heard
from erasekit.places import check_place
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve

KEPT = "The checkpoints of a training are kept: the same command goes on from there. What trains nothing starts again."


def command(
    method: options.Method = None,
    backbone: options.Backbone = None,
    task: options.Task = None,
    concept: options.Concept = None,
    kind: options.Kind = None,
    neutral: options.Neutral = None,
    preserve: options.Preserve = None,
    seed: options.Seed = None,
    preset: options.Preset = None,
    files: options.Files = None,
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
    flags |= {"kind": kind, "neutral": neutral, "preserve": tuple(preserve or ())}
    wanted = build(
        flags | {"seed": seed, "preset": preset, "files": files}, file=config, overrides=options.overrides(settings, vram)
    )
    registries = options.registries(plugin)
    plan = resolve(wanted, registries)
    if plan.separate:
        raise UsageError(f"Say what to erase, e.g. --concept '{plan.concepts[0].name}'.")
    from erasekit.backbones.memory import check_disk
    from erasekit.erasures.manifest import read_manifest
    from erasekit.erasures.modelcard import load_lines
    from erasekit.runs.compute import compute
    from erasekit.runs.preflight import preflight
    from erasekit.runs.workplace import kept, workplace

    _check_out(out, force=force)
    preflight(plan)
    check_disk(out)
    with listener() as told, heard(told), workplace(out, plan.hash) as work:
        if kept(work):
            say("Going on with what an interrupted 'erase' has left.")
        told(StageStarted("erase"))
        loaded = plan.backbone.load(plan.backbone_config)

        def log(step: int, total: int, values: Mapping[str, float]) -> None:
            told(StepEnd(step, total, values))

        erasure = compute(plan, loaded, registries, directory=work, log=log)
        sha256 = erasure.save(out, dtype=wanted.files)
    manifest = read_manifest(out)
    remains = erasure.remains.model_dump() if erasure.remains else {"residual": None, "drift": None}
    names = ", ".join(concept.name for concept in plan.concepts)
    summary = {"erasure": str(out), "concepts": [c.name for c in plan.concepts], "sha256": sha256} | remains
    tell(erasure)
    if as_json:
        put_json(summary)
    else:
        lines = load_lines(manifest, str(out), base=plan.backbone_config.path or getattr(plan.backbone, "path", ""))
        put(f"{out}  {names}  {sha256[:8]}{_size(manifest)}\n\n{lines.rstrip()}")


def _check_out(out: Path, *, force: bool) -> None:
    """See that the erasure may be written to a folder, before it is computed."""
    from erasekit.erasures.contents import check_replaceable
    from erasekit.runs.workplace import place_of

    for place in (out, place_of(out)):
        check_place(place)
    sweep_beside(out)
    if out.exists() and not force:
        raise UsageError(f"'{out}' exists. Give another folder with --out, or --force to replace it.")
    check_replaceable(out)


def _size(manifest: dict[str, Any]) -> str:
    """The ranks of an erasure of weights, and what they and the type of its files cost."""
    ranks = manifest.get("ranks", {}).values()
    if not ranks:
        return ""
    bound = manifest["config"].get("rank_error")
    cut = f", cut below an error of {bound:.0e}" if isinstance(bound, float) and bound else ""
    rounded = f"; {manifest['dtype']} costs {manifest['rounding']:.0e}" if manifest["rounding"] else ""
    return f"  rank {max(ranks)}{cut}{rounded}"
