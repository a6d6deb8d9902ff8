"""`erasekit generate`: draw prompts, with or without an erasure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erasekit.cli import options
from erasekit.cli.progress import listener
from erasekit.erasures.strength import Strength, parse
from erasekit.errors import UsageError
from erasekit.events import StageStarted, heard
from erasekit.runs.config import settings_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from erasekit.registration.plugins import Registries

Erasure = Annotated[
    Path | None, typer.Option("--erasure", "-e", metavar="FOLDER", help="An erasure to load.", show_default=False)
]


def command(
    prompts: Annotated[list[str], typer.Argument(help="What to draw.", show_default=False)],
    backbone: options.Backbone = None,
    erasure: Erasure = None,
    concept: options.Concept = None,
    strength: options.Strength = None,
    seed: Annotated[int, typer.Option("--seed", help="The seed of the first image; each further one has the next.")] = 0,
    n: Annotated[int, typer.Option("--n", min=1, help="Images per prompt.")] = 1,
    settings: options.Set = None,
    vram: options.Vram = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the images are written.")] = Path("images"),
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Draw images through the plain diffusers pipeline. With --concept, only those parts of the erasure are loaded."""
    registries = options.registries(plugin)
    chosen, seeds = options.chosen(settings, vram), [seed + i for i in range(n)]
    with listener() as told, heard(told):
        told(StageStarted("generate"))
        images = _draw(prompts, seeds, backbone, erasure, concept, parse(strength or ()), registries, chosen)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(images):
        path = out / f"{i // n:03d}-{seed + i % n}.png"
        image.save(path)
        paths.append(str(path))
    typer.echo(json.dumps(paths, indent=1) if as_json else "\n".join(paths))


def _draw(
    prompts: list[str],
    seeds: list[int],
    backbone: str | None,
    erasure: Path | None,
    concepts: list[str] | None,
    strength: Strength | None,
    registries: Registries,
    chosen: dict[str, Any],
) -> list[Image]:
    """Every prompt with every seed."""
    from erasekit.erasures.loading import load_into
    from erasekit.erasures.manifest import read_manifest
    from erasekit.evaluation.sampling import generate
    from erasekit.runs.playground import usual_protocol
    from erasekit.safety import reject_unsafe

    if (concepts or strength is not None) and erasure is None:
        raise UsageError("--concept and --strength are of an erasure: give --erasure FOLDER too.")
    reject_unsafe(prompts)
    name = backbone or (read_manifest(erasure)["backbone"] if erasure else "sd15-mini")
    kind = registries.backbones.get(name)
    protocol = usual_protocol(kind, chosen.get("protocol", {}), registries)
    loaded = kind.load(settings_of(kind.Config, chosen.get("backbone", {}), "backbone."))
    loaded.encode([*prompts, ""])  # before the denoiser comes, which may need the room of the text encoders
    pipe = loaded.pipeline(encoders=False, shared=True)
    if erasure:
        load_into(pipe, erasure, concepts or None, strength=strength, base=loaded, component=registries.components.get)
    return generate(loaded, pipe, [p for p in prompts for _ in seeds], seeds * len(prompts), protocol)
