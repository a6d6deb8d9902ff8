"""`erasekit evaluate`: measure an erasure that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from erasekit.cli import options
from erasekit.cli.ends import put_json, say
from erasekit.cli.matrix import matrix as draw_matrix
from erasekit.cli.progress import listener
from erasekit.cli.run import show_results
from erasekit.errors import UsageError
from erasekit.runs.config import build, parse_overrides

KEPT = "What was finished is kept: the same command goes on from there."


def command(
    erasure: Annotated[Path | None, typer.Argument(help="The folder of an erasure.", show_default=False)] = None,
    task: options.Task = None,
    seed: options.Seed = None,
    limit: options.Limit = None,
    settings: options.Set = None,
    prompts: options.Prompts = None,
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Erase each concept of the task in turn, and measure all: what takes what with it."),
    ] = False,
    method: options.Method = None,
    backbone: options.Backbone = None,
    concept: options.Concept = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="How many, for --matrix; 0: one for each GPU.")] = 0,
    out: options.Out = Path("runs"),
    force: Annotated[bool, typer.Option("--force", help="Measure again, even if the run is finished.")] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Draw images with an erasure and without, measure both, and write a report.

    With --matrix no erasure is given: those of --method are made, one for each concept, and finished runs are used again.
    """
    from erasekit.erasures.manifest import read_manifest
    from erasekit.runs.runner import planned, run

    given = {"method": method, "backbone": backbone, "concepts": tuple(concept or ())}
    if matrix:
        _check_matrix(erasure, force=force)
        flags = given | {"task": task, "seed": seed, "limit": limit}
        plugins = tuple(path.resolve() for path in plugin or ())
        how: dict[str, Any] = {"out": out, "workers": workers, "plugins": plugins, "as_json": as_json}
        wanted = build(flags, overrides=options.overrides(settings, None, prompts))
        return draw_matrix(wanted, options.registries(plugin), **how)
    if erasure is None:
        raise UsageError("Nothing to measure is given. Give the folder of an erasure, or --matrix.")
    if named := [f"--{'concept' if name == 'concepts' else name}" for name, value in given.items() if value]:
        raise UsageError(f"An erasure says itself what made it. Leave {' and '.join(named)} out, or add --matrix.")
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


def _check_matrix(erasure: Path | None, *, force: bool) -> None:
    """See that nothing is given that a matrix has no use for."""
    if erasure is not None:
        raise UsageError(f"--matrix makes erasures of its own, given '{erasure}'. Leave one of them out.")
    if force:
        raise UsageError("--matrix uses finished runs again. For new ones, use another --out in place of --force.")


def of_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """What an erasure says of itself, as fields of a configuration."""
    return {
        "method": manifest["method"],
        "backbone": manifest["backbone"],
        "concepts": tuple(":".join((c["name"], ",".join(c["phrases"][1:]))).rstrip(":") for c in manifest["concepts"]),
        "options": {"method": manifest["config"]},
    }
