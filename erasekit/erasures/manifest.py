"""`erasure.json`, the record of an erasure: which files belong to it, their hashes, and the base that it was made for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from erasekit.backbones.protocol import Backbone
from erasekit.errors import EnvironmentProblem, UsageError

SCHEMA_VERSION = 1
MANIFEST = "erasure.json"
ALL = "all.safetensors"


def file_stems(names: Sequence[str]) -> dict[str, str]:
    """A file name without ending for each concept: plain letters, distinct, also fit to name a diffusers adapter."""
    stems: dict[str, str] = {}
    for name in names:
        stem = slug(name)
        taken = {"all", *stems.values()}
        stems[name] = next(s for s in (stem, *(f"{stem}-{k}" for k in range(2, len(names) + 3))) if s not in taken)
    return stems


def digest(files: Mapping[str, str]) -> str:
    """SHA-256 over the names and hashes of tensor files."""
    lines = sorted(f"{name} {sha256}\n" for name, sha256 in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_manifest(folder: Path, base: Backbone | None = None) -> dict[str, Any]:
    """What `erasure.json` says; the tensor files are not looked at.

    Raises:
        UsageError: the folder holds no erasure, one of a newer erasekit, or one of another base.
        EnvironmentProblem: `erasure.json` is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"'{folder}' holds no erasure: there is no {MANIFEST} in it.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        newer, made_for = manifest["schema_version"] > SCHEMA_VERSION, manifest["base"]
        if digest(manifest["files"]) != manifest["erasure_sha256"]:
            raise ValueError("its hashes do not belong together")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentProblem(f"'{path}' is damaged ({error}). Copy the erasure again, or make it again.") from error
    if newer:
        raise UsageError(f"'{folder}' was written by a newer erasekit (schema {manifest['schema_version']}); update erasekit.")
    if base is not None and not _fits(base, made_for):
        raise UsageError(
            f"'{folder}' was made for another base, {made_for['repo']} ({made_for['sha256'][:8]}), not for '{base.source}'. "
            f"Use it with '--backbone {manifest['backbone']}'."
        )
    return manifest


def _fits(base: Backbone, made_for: Mapping[str, Any]) -> bool:
    """Whether the layers that an erasure touches are those of the base that it was made for."""
    try:
        return bool(base.fingerprint(made_for["modules"]) == made_for["sha256"])
    except KeyError:  # the base has no such layer
        return False


def check_file(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """See that a tensor file is what was written."""
    try:
        sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    except OSError as error:
        raise EnvironmentProblem(f"'{folder / name}' cannot be read ({error.strerror}). Copy the erasure again.") from error
    if sha256 != manifest["files"][name]:
        raise EnvironmentProblem(f"'{folder / name}' is damaged: its SHA-256 is not the recorded one. Copy the erasure again.")


def slug(name: str) -> str:
    """A name as a part of a file's name and of an adapter's."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "concept"
    # peft keeps adapters in a ModuleDict, which has no room for the names of its own attributes.
    return f"{slug}-concept" if hasattr(nn.ModuleDict(), slug) else slug
