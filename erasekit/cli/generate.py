"""`erasekit generate`: draw prompts, with or without an erasure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from erasekit.atomic import sweep_beside
from erasekit.cli import options
from erasekit.cli.ends import put, put_json
from erasekit.cli.progress import listener
from erasekit.erasures.strength import Strength, factors, parse
from erasekit.errors import UsageError, unknown
from erasekit.evaluation.tasks import Protocol
from erasekit.events import StageStarted, heard
from erasekit.places import check_place
from erasekit.runs.config import settings_of
from erasekit.runs.resolve import check_drawing

if TYPE_CHECKING:
    from erasekit.registration.plugins import Registries

KEPT = "Images that were drawn are kept: the same command draws the others."
LARGEST_SEED = 2**63 - 1

Erasure = Annotated[
    Path | None, typer.Option("--erasure", "-e", metavar="FOLDER", help="An erasure to load.", show_default=False)
]


def command(
    prompts: Annotated[list[str], typer.Argument(help="What to draw.", show_default=False)],
    backbone: options.Backbone = None,
    erasure: Erasure = None,
    concept: options.Concept = None,
    strength: options.Strength = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The seed of the first image; each further one has the next.")] = 0,
    n: Annotated[int, typer.Option("--n", min=1, max=100_000, help="Images per prompt.")] = 1,
    settings: options.Set = None,
    vram: options.Vram = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the images are written.")] = Path("images"),
    force: Annotated[bool, typer.Option("--force", help="Replace other images that were drawn there before.")] = False,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Draw images through the plain diffusers pipeline. With --concept, only those parts of the erasure are loaded.

    Each batch is written as soon as it is drawn, and the same command goes on with one that was stopped.
    """
    if seed + n - 1 > LARGEST_SEED:
        raise UsageError(f"Seeds go up to {LARGEST_SEED}, given {seed} for the first of {n}.")
    _check_prompts(prompts)
    registries = options.registries(plugin)
    drawing = _drawing(backbone, erasure, concept, parse(strength or ()), options.chosen(settings, vram), registries)
    every = [(prompt, seed + i) for prompt in prompts for i in range(n)]
    paths = [out / f"{i // n:03d}-{seed}.png" for i, (_, seed) in enumerate(every)]
    keys = _keys(every, drawing)
    _check_images(out, paths, keys, force=force)
    with listener() as told, heard(told):
        told(StageStarted("generate"))
        _draw(every, paths, keys, drawing, registries)
    if as_json:
        put_json([str(path) for path in paths])
    else:
        put("\n".join(map(str, paths)))


class Drawing(NamedTuple):
    """How images are drawn: everything but their prompts and seeds."""

    kind: Any
    config: Any
    protocol: Protocol
    erasure: Path | None
    sha256: str
    concepts: list[str] | None
    strength: Strength | None


def _drawing(
    backbone: str | None,
    erasure: Path | None,
    concepts: list[str] | None,
    strength: Strength | None,
    chosen: dict[str, Any],
    registries: Registries,
) -> Drawing:
    """Look up and check all that is named; nothing is loaded."""
    from erasekit.erasures.manifest import MANIFEST, read_manifest
    from erasekit.runs.playground import usual_protocol

    if (concepts or strength is not None) and erasure is None:
        raise UsageError("--concept and --strength are of an erasure: give --erasure FOLDER too.")
    manifest = read_manifest(erasure) if erasure else {}
    for concept in concepts or ():
        if concept not in manifest["parts"]:
            raise unknown("concept of this erasure", concept, manifest["parts"], f"{erasure}/{MANIFEST}")
    factors(strength, concepts or list(manifest.get("parts", {})))
    kind = registries.backbones.get(backbone or manifest.get("backbone", "sd15-mini"))
    protocol = usual_protocol(kind, chosen.get("protocol", {}), registries)
    config = settings_of(kind.Config, chosen.get("backbone", {}), "backbone.")
    check_drawing(kind, protocol)
    return Drawing(kind, config, protocol, erasure, manifest.get("erasure_sha256", ""), concepts, strength)


def _check_prompts(prompts: list[str]) -> None:
    """See that every prompt is text: the shell hands on any bytes, and no tokenizer takes them."""
    for i, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError(f"Prompt {i + 1} is no UTF-8, given '{prompt:.80}'. Give it in the terminal's encoding.") from None


def _keys(every: list[tuple[str, int]], drawing: Drawing) -> list[str]:
    from erasekit.evaluation.sampling import keys_of

    prompts, seeds = [prompt for prompt, _ in every], [seed for _, seed in every]
    drawn_by = drawing.kind.name, drawing.config, drawing.sha256, drawing.concepts, drawing.strength
    return keys_of(prompts, seeds, drawing.protocol, *drawn_by)


def _check_images(out: Path, paths: list[Path], keys: list[str], *, force: bool) -> None:
    """See that images can be written, and that none takes the place of something else.

    Raises:
        UsageError: a file is in the way; says which.
    """
    from erasekit.evaluation.sampling import key_in

    check_place(out)
    for path, key in zip(paths, keys, strict=True):
        if not path.exists() and not path.is_symlink():
            continue
        found = key_in(path)
        if not found:
            raise UsageError(f"'{path}' was not drawn by erasekit, and is not touched. Choose another folder with --out.")
        if found != key and not force:
            raise UsageError(f"'{path}' is there, drawn from something else. Choose another --out, or --force to replace it.")


def _draw(every: list[tuple[str, int]], paths: list[Path], keys: list[str], drawing: Drawing, registries: Registries) -> None:
    """Every prompt with every seed, into its file."""
    from erasekit.erasures.loading import load_into
    from erasekit.evaluation.sampling import generate_to
    from erasekit.safety import reject_unsafe

    prompts, seeds = [prompt for prompt, _ in every], [seed for _, seed in every]
    reject_unsafe(prompts)
    loaded = drawing.kind.load(drawing.config)
    loaded.encode([*dict.fromkeys(prompts), ""])  # before the denoiser comes, which may need the room of the text encoders
    pipe = loaded.pipeline(encoders=False, shared=True)
    if drawing.erasure:
        chosen, strength = drawing.concepts or None, drawing.strength
        load_into(pipe, drawing.erasure, chosen, strength=strength, base=loaded, component=registries.components.get)
    for path in paths:
        sweep_beside(path)
    generate_to(paths, keys, loaded, pipe, prompts, seeds, drawing.protocol)
