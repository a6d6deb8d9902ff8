"""`erasure.json`, the record of an erasure: which files belong to it, their hashes, and the base that it was made for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from erasekit.backbones.protocol import Backbone
from erasekit.concepts import Concept
from erasekit.documents import Damaged, parse_document, plain_file
from erasekit.erasures.remains import Residual
from erasekit.errors import UsageError
from erasekit.safety import reject_unsafe
from erasekit.texts import Line

SCHEMA_VERSION = 1
MANIFEST = "erasure.json"
CARD = "README.md"  # written again when something is measured, and so no part of what is hashed
ALL = "all.safetensors"
SETTINGS, PROMPTS = "guidance.json", "guidance.safetensors"  # of an erasure that changes no weights
ADVICE = "Copy the erasure again, or make it again."

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]{0,99}$")]
Module = Annotated[str, Field(pattern=r"^[^\s./\\]+(\.[^\s./\\]+)*$", max_length=300)]
TensorFile = Annotated[str, Field(pattern=r"^(parts/)?[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors$", max_length=250)]
File = Annotated[str, Field(pattern=r"^((parts/)?[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors|guidance\.json)$", max_length=250)]


class Base(BaseModel):
    """The model that an erasure was made for: where it was had, and the layers that count with a hash over their weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: Line
    revision: Annotated[str, Field(pattern=r"^[\w./-]*$", max_length=200)]
    sha256: Sha256
    modules: tuple[Module, ...] = Field(min_length=1)


class Manifest(BaseModel):
    """The content of erasure.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1]
    kind: Literal["weights", "guidance"]
    base: Base
    backbone: Name
    denoiser: Literal["unet", "transformer"]
    method: Name
    config: dict[str, Any]
    config_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    concepts: tuple[Concept, ...]
    residual: dict[str, Residual] | None
    drift: float | None
    figures: dict[str, Any]
    warnings: tuple[Line, ...]
    parts: dict[Line, Annotated[dict[Line, TensorFile], Field(min_length=1)]]
    ranks: dict[TensorFile, int] = Field(default_factory=dict)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    rounding: float = 0.0
    files: dict[File, Sha256]
    erasure_sha256: Sha256
    environment: dict[Name, Line]
    created: Line
    manifest_sha256: Sha256

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.expected_files() != set(self.files):
            raise ValueError("'files' is not the list of the files that 'kind' and 'parts' speak of")
        if self.kind == "weights" and not self.parts:
            raise ValueError("'parts' is empty: the erasure changes nothing")
        if digest(self.files) != self.erasure_sha256:
            raise ValueError("its hashes do not belong together")
        return self

    def expected_files(self) -> set[str]:
        """The files that an erasure of this kind with these parts has: no more and no fewer."""
        if self.kind == "guidance":
            return {SETTINGS, PROMPTS}
        whole = {f"{stem}.safetensors" for stem in file_stems(list(self.parts)).values()}
        return {ALL, *whole, *(file for parts in self.parts.values() for file in parts.values())}


def file_stems(names: Sequence[str]) -> dict[str, str]:
    """A file name without ending for each concept: plain letters, distinct, also fit to name a diffusers adapter."""
    stems: dict[str, str] = {}
    for name in names:
        stem = slug(name)
        taken = {"all", "guidance", *(s.lower() for s in stems.values())}  # some disks do not tell "Cat" from "cat"
        choices = (stem, *(f"{stem}-{k}" for k in range(2, len(names) + 3)))
        stems[name] = next(s for s in choices if s.lower() not in taken)
    return stems


def digest(files: Mapping[str, str]) -> str:
    """SHA-256 over the names and hashes of tensor files."""
    lines = sorted(f"{name} {sha256}\n" for name, sha256 in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over all that a manifest says but this hash itself."""
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write erasure.json, sealed.

    Raises:
        ValueError: it would not be read again; says which key is wrong.
    """
    sealed = dict(content) | {"manifest_sha256": seal(content)}
    text = json.dumps(sealed, indent=1, ensure_ascii=False) + "\n"
    parse_document(Manifest, text.encode())
    (folder / MANIFEST).write_text(text, "utf-8")


def read_manifest(folder: Path, base: Backbone | None = None) -> dict[str, Any]:
    """What `erasure.json` says, checked against its schema; the other files are not looked at.

    Raises:
        UsageError: the folder holds no erasure, one of a newer erasekit, one of another base, or one whose words are refused.
        EnvironmentProblem: `erasure.json` is damaged.
    """
    path = folder / MANIFEST
    try:
        plain_file(path)
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"'{folder}' holds no erasure: there is no {MANIFEST} in it ({error.strerror}).") from error
    try:
        if (version := parse_document(_Versioned, content).schema_version) > SCHEMA_VERSION:
            raise UsageError(f"'{folder}' was written by a newer erasekit (schema {version}); update erasekit.")
        manifest = parse_document(Manifest, content)
        if seal(json.loads(content)) != manifest.manifest_sha256:
            raise ValueError("it is not what its own hash, 'manifest_sha256', was taken of")
    except ValueError as error:
        raise Damaged(f"'{path}' is damaged ({error}). {ADVICE}") from error
    reject_unsafe(_words(manifest))
    if base is not None and not _fits(base, manifest.base):
        made_for = f"{manifest.base.repo} ({manifest.base.sha256[:8]})"
        raise UsageError(
            f"'{folder}' was made for another base, {made_for}, not for '{base.source}'. "
            f"Use it with '--backbone {manifest.backbone}'."
        )
    return manifest.model_dump(mode="json")


class _Versioned(BaseModel):
    """As much of a manifest as every version has."""

    schema_version: int = Field(ge=1, strict=True)


def _words(manifest: Manifest) -> Iterator[str]:
    """The prompts that an erasure speaks of."""
    for concept in manifest.concepts:
        yield from concept.prompts()
        yield from (concept.neutralise(prompt) for prompt in concept.prompts())
        yield from concept.preserve


def _fits(base: Backbone, made_for: Base) -> bool:
    """Whether the layers that an erasure touches are those of the base that it was made for."""
    try:
        return bool(base.fingerprint(list(made_for.modules)) == made_for.sha256)
    except KeyError:  # the base has no such layer
        return False


def slug(name: str) -> str:
    """A name as a part of a file's name and of an adapter's."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:100] or "concept"
    # peft keeps adapters in a ModuleDict, which has no room for the names of its own attributes.
    return f"{slug}-concept" if hasattr(nn.ModuleDict(), slug) else slug
