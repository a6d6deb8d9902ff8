"""`erasekit evaluate`: measure an erasure that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from erasekit.cli import options
from erasekit.cli.ends import put_json, say
from erasekit.cli.progress import listener
from erasekit.cli.run import show_results
from erasekit.errors import UsageError
from erasekit.runs.config import build, parse_overrides

KEPT = "What was finished is kept: the same command goes on from there."


def command(
    erasure: Annotated[Path, typer.Argument(help="The folder of an erasure.", show_default=False)],
    task: options.Task = None,
    seed: options.Seed = None,
    limit: options.Limit = None,
    settings: options.Set = None,
    prompts: options.Prompts = None,
    out: options.Out = Path("runs"),
    force: Annotated[bool, typer.Option("--force", help="Measure again, even if the run is finished.")] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Draw images with an erasure and without, measure both, and write a report."""
    from erasekit.erasures.manifest import read_manifest
    from erasekit.runs.runner import planned, run

    if "method" in parse_overrides(settings or ()):
        raise UsageError("An erasure keeps the settings that it was made with. Set backbone, protocol or evaluators here.")
    flags = of_manifest(read_manifest(erasure)) | {"task": task, "seed": seed, "limit": limit}
    wanted = build(flags, overrides=options.overrides(settings, None, prompts))
    registries = options.registries(plugin)
    with listener() as told:
        result = run(wanted, out=out, force=force, listener=told, registries=registries, erasure=erasure)
    if not told.started:
        say("Finished before: these are its numbers. Begin anew with --force.")
    if as_json:
        put_json(result.model_dump(mode="json"))
    else:
        show_results(planned(wanted, registries, erasure=erasure), out)


def of_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """What an erasure says of itself, as fields of a configuration."""
    return {
        "method": manifest["method"],
        "backbone": manifest["backbone"],
        "concepts": tuple(":".join((c["name"], ",".join(c["phrases"][1:]))).rstrip(":") for c in manifest["concepts"]),
        "options": {"method": manifest["config"]},
    }
