"""`erasekit.export`: an erasure in the form that another program loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from erasekit.atomic import set_aside, sweep_beside
from erasekit.erasures import tensors
from erasekit.erasures.deltas import reduced, scale, summed
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.exporting import Exported, Exporter, Order
from erasekit.erasures.manifest import MANIFEST, file_stems, read_manifest
from erasekit.erasures.strength import Strength, factors
from erasekit.errors import EnvironmentProblem, UsageError, unknown
from erasekit.places import check_place
from erasekit.registration.plugins import Registries, default
from erasekit.runs.config import settings_of


def export(
    folder: Path | str,
    to: str,
    out: Path | str | None = None,
    *,
    concepts: Sequence[str] | None = None,
    strength: Strength | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    backbone: Mapping[str, Any] | None = None,
    force: bool = False,
    registries: Registries | None = None,
) -> Exported:
    """Write an erasure in another form.

    Args:
        folder: the erasure.
        to: a registered form: `diffusers`, `kohya`, `merged`.
        out: the file or folder to write; left out, `erased-<concepts>-<backbone>` with the form's ending, here.
        concepts: only these; all, if left out.
        strength: what the deltas are multiplied by, of all concepts or of each by name.
        rank: the most ranks of a layer: the nearest delta of that rank is written, and what that costs is said.
        dtype: of the tensors: `float32`, `float16` or `bfloat16`; left out, float32, of a merged model its own.
        backbone: settings of the backbone, for forms that need the base model.
        force: replace what is there.
        registries: what names stand for; what is installed, if left out.

    Raises:
        UsageError: there is no such erasure, form or concept; the erasure changes no weights; or `out` exists.
        EnvironmentProblem: the base cannot be loaded, or the disk is full.
    """
    registries, folder = registries or default(), Path(folder)
    exporter: Exporter = registries.exporters.get(to)()
    record, erasure = read_manifest(folder), Erasure.load(folder)
    if erasure.kind == "guidance":
        raise UsageError(
            f"'{folder}' changes no weights: it steers how images are drawn, so there is no file that another program could "
            f"load. In Python: erasekit.load(pipe, FOLDER)."
        )
    chosen, cut = _chosen(erasure, concepts, strength), 0.0
    if rank is not None:
        exact = chosen.total()
        total, cut = reduced(exact, rank)
        chosen = replace(chosen, deltas={"all": {"cut": total}})
    kind = registries.backbones.get(record["backbone"])
    config = settings_of(kind.Config, backbone or {}, "backbone.")
    stems = "-".join(file_stems([c.name for c in chosen.concepts]).values())
    target = Path(out) if out else Path(f"erased-{stems}-{record['backbone']}{exporter.suffix}")
    _see_free(target, folder, force=force)
    order = Order(chosen, record, target, tensors.dtype_of(dtype) if dtype else None, kind, config, cut)
    try:
        with set_aside(target):
            return exporter.write(order)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EnvironmentProblem(f"Cannot write '{target}': {reason}. Free disk space or choose another place.") from error


def _chosen(erasure: Erasure, concepts: Sequence[str] | None, strength: Strength | None) -> Erasure:
    """The parts of an erasure that are wanted, as strong as they are wanted."""
    names = list(erasure.deltas) if concepts is None else list(concepts)
    for name in names:
        if name not in erasure.deltas:
            raise unknown("concept of this erasure", name, erasure.deltas, MANIFEST)
    factor = factors(strength, list(erasure.deltas))
    parts = {name: {"whole": scale(summed(list(erasure.deltas[name].values())), factor[name])} for name in names}
    own = tuple(c for c in erasure.concepts if concepts is None or c.name in names) or erasure.concepts
    return replace(erasure, concepts=own, deltas=parts)


def _see_free(out: Path, folder: Path, *, force: bool) -> None:
    """See that `out` can be written, and that what is there may be replaced.

    Raises:
        UsageError: something is in the way.
    """
    sweep_beside(out)
    check_place(out)
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise UsageError(f"'{out}' exists. Give another name with --out, or --force to replace it.")
    if out.resolve() in (folder.resolve(), *folder.resolve().parents, Path.home()):
        raise UsageError(f"'{out}' holds the erasure itself. Give another name with --out.")
    if strange := _strange(out):
        raise UsageError(f"'{strange}' was not exported by erasekit, and is not touched. Give another name with --out.")


def _strange(out: Path) -> Path | None:
    """What of a file or folder no export writes."""
    if not out.is_dir() or out.is_symlink():
        return None if out.suffix == ".safetensors" and out.is_file() else out
    index, names = out / "model_index.json", {"model_index.json", "README.md"}
    try:
        names |= set(json.loads(index.read_text(encoding="utf-8"))) if index.is_file() else set()
    except (OSError, ValueError):
        return index
    whole = (path for path in out.iterdir() if path.name not in names and path.suffix != ".safetensors")
    return next(whole, None)
