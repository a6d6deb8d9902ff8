"""An erasure in memory and on disk: one small LoRA file per concept that loads in plain diffusers.

An erasure that acts at sampling time has no such files, but the prompts and settings that it steers by.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from erasekit import tensors
from erasekit.atomic import linked
from erasekit.concepts import Concept
from erasekit.deltas import Deltas, concatenate
from erasekit.errors import EnvironmentProblem, ErasekitError, UsageError, unknown
from erasekit.events import progress
from erasekit.remains import Remains
from erasekit.tensors import Written

if TYPE_CHECKING:
    from erasekit.backbone import Backbone
    from erasekit.guidance import Guidance
    from erasekit.method import RunContext

SCHEMA_VERSION = 1
MANIFEST = "erasure.json"
ALL = "all.safetensors"


@dataclass(frozen=True)
class Erasure:
    """What a method computed, and from what.

    Attributes:
        method: its registered name.
        config: its settings, as plain data.
        concepts: what was erased.
        backbone: the registered name of the base.
        prefix: the denoiser's name in the pipeline.
        base: `repo`, `revision` and `sha256` of the base's layers that it touches (see `Backbone.fingerprint`), or of
            those that it names as `modules`.
        deltas: {concept: {part: deltas}}. A part is what can be loaded on its own, e.g. "refine" and "adapter"; an
            adapter that several concepts share stands under a name of its own.
        guidance: what steers sampling in place of changed weights; then there are no deltas.
        figures: the method's own numbers, e.g. the damping that it chose.
        remains: what it leaves of its concepts and moves of the rest, by predictions; None if that was not measured.
        warnings: what a user has to know, one line each.
    """

    method: str
    config: Mapping[str, Any]
    concepts: tuple[Concept, ...]
    backbone: str
    prefix: str
    base: Mapping[str, Any]
    deltas: Mapping[str, Mapping[str, Deltas]]
    guidance: Guidance | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    remains: Remains | None = None
    warnings: tuple[str, ...] = ()

    @property
    def kind(self) -> Literal["weights", "guidance"]:
        """Whether it changes weights, or only how pictures are drawn."""
        return "weights" if self.guidance is None else "guidance"

    @classmethod
    def of(
        cls,
        ctx: RunContext,
        *,
        method: str,
        config: Mapping[str, Any],
        deltas: Mapping[str, Mapping[str, Deltas]] | None = None,
        guidance: Guidance | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> Erasure:
        """The erasure of `ctx.concepts` from `ctx.backbone`, by deltas of its weights or by guidance."""
        backbone, deltas = ctx.backbone, deltas or {}
        # Guidance changes no layer; its prompts belong to models whose text sites are the same.
        modules = [site.name for site in backbone.text_sites()] if guidance else _modules(deltas)
        return cls(
            method=method,
            config=config,
            concepts=ctx.concepts,
            backbone=backbone.name,
            prefix=backbone.prefix,
            base={
                "repo": backbone.source,
                "revision": backbone.revision,
                "sha256": backbone.fingerprint(modules),
                "modules": modules,
            },
            deltas=deltas,
            guidance=guidance,
            figures=figures or {},
        )

    def total(self) -> Deltas:
        """The sum over concepts and parts, as `all.safetensors` holds it."""
        return concatenate([part for parts in self.deltas.values() for part in parts.values()])

    def save(self, folder: Path, *, dtype: str = "float32") -> str:
        """Write the erasure, replacing what is in `folder`; it appears there whole or not at all.

        The same deltas give the same bytes: time and environment stand in `erasure.json` only.

        Args:
            folder: where to.
            dtype: of the tensors in the files, `float32`, `float16` or `bfloat16`; `erasure.json` says as `rounding` what
                that costs, |rounded - Delta| / |Delta|.

        Returns:
            SHA-256 over the tensor files' names and hashes.

        Raises:
            ErasekitError: the erasure holds no deltas, or values that are not finite.
            EnvironmentProblem: the folder cannot be written.
        """
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True)
            progress("writing", 0, 1)
            record: dict[str, Any] = {"parts": {}}
            if self.guidance:
                files = self.guidance.write(temporary)
            else:
                written, parts = self._write_tensors(temporary, getattr(torch, dtype))
                files = {name: of.sha256 for name, of in written.items()}
                ranks = {name: of.rank for name, of in written.items()}
                record = {"parts": parts, "ranks": ranks, "dtype": dtype, "rounding": written[ALL].rounding}
            manifest = json.dumps(self._manifest(files, record), indent=1, ensure_ascii=False)
            (temporary / MANIFEST).write_text(manifest + "\n", "utf-8")
            _replace(folder, temporary)
            progress("writing", 1, 1)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise EnvironmentProblem(f"Cannot write '{folder}': {reason}. Free disk space or choose another folder.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return digest(files)

    @classmethod
    def load(cls, folder: Path, base: Backbone | None = None) -> Erasure:
        """Read an erasure, every file checked against its hash.

        Raises:
            UsageError: the folder holds no erasure, one of a newer erasekit, or one of another base.
            EnvironmentProblem: a file is missing or damaged.
        """
        manifest = read_manifest(folder, base)
        for name in manifest["files"]:
            _check(folder, manifest, name)
        guidance = None
        if manifest.get("kind") == "guidance":
            from erasekit.guidance import Guidance

            guidance = Guidance.read(folder)
        deltas = {
            entry: {part: tensors.read(folder / file, manifest["denoiser"]) for part, file in parts.items()}
            for entry, parts in manifest["parts"].items()
        }
        return cls(
            method=manifest["method"],
            config=manifest["config"],
            concepts=tuple(Concept.model_validate(c) for c in manifest["concepts"]),
            backbone=manifest["backbone"],
            prefix=manifest["denoiser"],
            base=manifest["base"],
            deltas=deltas,
            guidance=guidance,
            figures=manifest.get("figures", {}),
            remains=None if manifest.get("residual") is None else Remains(**{k: manifest[k] for k in ("residual", "drift")}),
            warnings=tuple(manifest.get("warnings", ())),
        )

    def _write_tensors(self, folder: Path, dtype: torch.dtype) -> tuple[dict[str, Written], dict[str, dict[str, str]]]:
        """Write all tensor files; what each holds, and which file holds which part of which concept."""
        files: dict[str, Written] = {}
        parts: dict[str, dict[str, str]] = {}
        stems = file_stems(list(self.deltas))
        for entry, own in self.deltas.items():
            whole = f"{stems[entry]}.safetensors"
            files[whole] = tensors.write(folder / whole, concatenate(list(own.values())), self.prefix, dtype)
            parts[entry] = {part: f"parts/{stems[entry]}.{_slug(part)}.safetensors" if len(own) > 1 else whole for part in own}
            named = {parts[entry][part]: deltas for part, deltas in own.items()} if len(own) > 1 else {}
            files |= {name: tensors.write(folder / name, deltas, self.prefix, dtype) for name, deltas in named.items()}
        if len(self.deltas) == 1:  # the concept's file is the sum
            linked(folder / whole, folder / ALL)
            files[ALL] = files[whole]
        else:
            files[ALL] = tensors.write(folder / ALL, self.total(), self.prefix, dtype)
        return files, parts

    def _manifest(self, files: Mapping[str, str], record: Mapping[str, Any]) -> dict[str, Any]:
        config = json.loads(json.dumps(self.config, default=str))
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "base": {"modules": _modules(self.deltas)} | dict(self.base),
            "backbone": self.backbone,
            "denoiser": self.prefix,
            "method": self.method,
            "config": config,
            "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8],
            "concepts": [c.model_dump(mode="json") for c in self.concepts],
            **({"residual": None, "drift": None} if self.remains is None else self.remains.model_dump()),
            "figures": dict(self.figures),
            "warnings": list(self.warnings),
            **record,
            "files": files,
            "erasure_sha256": digest(files),
            "environment": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "diffusers", "peft")},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _modules(deltas: Mapping[str, Mapping[str, Deltas]]) -> list[str]:
    """The layers that an erasure touches."""
    return sorted({module for parts in deltas.values() for part in parts.values() for module in part})


def file_stems(names: Sequence[str]) -> dict[str, str]:
    """A file name without ending for each concept: plain letters, distinct, also fit to name a diffusers adapter."""
    stems: dict[str, str] = {}
    for name in names:
        stem = _slug(name)
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


def load_into(
    pipe: Any,
    folder: Path | str,
    concepts: Sequence[str] | None = None,
    *,
    base: Backbone | None = None,
    component: Callable[[str, str], Any] | None = None,
) -> list[str]:
    """Load an erasure into a diffusers pipeline: with the pipeline's own `load_lora_weights`, or as a hook on its denoiser.

    Args:
        pipe: the pipeline of the erasure's base.
        folder: the erasure.
        concepts: load these, an adapter each; all of them as one adapter (`all`) if left out.
        base: refuse an erasure of another one; says whether a pipeline of its kind is called with true guidance.
        component: looks up the scheme of an erasure that changes no weights; among what is installed, if left out.

    Returns:
        The adapters' names, all active, for `pipe.set_adapters`; none of an erasure that changes no weights, which
        `erasekit.guidance.detach` takes out again.

    Raises:
        UsageError: see `read_manifest`; or the erasure has no such concept, or the pipeline's projections are fused.
        EnvironmentProblem: a file is missing or damaged.
        ErasekitError: diffusers did not load every tensor.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, base)
    if manifest.get("kind") == "guidance":
        if concepts is not None:
            raise UsageError(f"'{folder}' steers away from all its concepts in one: it has no parts. Load it whole.")
        _load_guidance(pipe, folder, manifest, base, component)
        return []
    stems = file_stems(list(manifest["parts"]))
    for concept in concepts or ():
        if concept not in stems:
            raise unknown("concept of this erasure", concept, stems, f"{folder}/{MANIFEST}")
    names = ["all"] if concepts is None else [stems[c] for c in concepts]
    denoiser: Any = getattr(pipe, manifest["denoiser"])
    if any(getattr(m, "fused_projections", False) for m in denoiser.modules()):
        raise UsageError(
            "The pipeline's projections are fused and would bypass the erasure: call unfuse_qkv_projections() first."
        )
    for name in names:
        _load_file(pipe, denoiser, folder, manifest, name)
    if names:
        pipe.set_adapters(names)
    return names


def _load_guidance(
    pipe: Any,
    folder: Path,
    manifest: Mapping[str, Any],
    base: Backbone | None,
    component: Callable[[str, str], Any] | None,
) -> None:
    """Attach the scheme of an erasure that changes no weights."""
    from erasekit.guidance import Guidance, attach
    from erasekit.plugins import default

    for name in manifest["files"]:
        _check(folder, manifest, name)
    guidance = Guidance.read(folder)
    scheme = (component or default().components.get)("guidance", guidance.scheme)
    attach(pipe, guidance, scheme(guidance.settings), embedded=base is None or base.embedded_guidance)


def _load_file(pipe: Any, denoiser: Any, folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Load one file as the adapter `name` and see that every tensor arrived."""
    from peft.functional import get_peft_model_state_dict

    from erasekit.quiet import quiet

    file = f"{name}.safetensors"
    _check(folder, manifest, file)
    with quiet():
        pipe.load_lora_weights(folder, weight_name=file, adapter_name=name)
    saved = {key.removeprefix(f"{manifest['denoiser']}.") for key in load_file(folder / file)}
    loaded = get_peft_model_state_dict(denoiser, adapter_name=name).keys() if name in denoiser.peft_config else set()
    if saved != loaded:
        raise ErasekitError(f"'{file}' holds {len(saved)} tensors, the pipeline loaded {len(saved & loaded)} of them.")


def _check(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """See that a tensor file is what was written."""
    try:
        sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    except OSError as error:
        raise EnvironmentProblem(f"'{folder / name}' cannot be read ({error.strerror}). Copy the erasure again.") from error
    if sha256 != manifest["files"][name]:
        raise EnvironmentProblem(f"'{folder / name}' is damaged: its SHA-256 is not the recorded one. Copy the erasure again.")


def _replace(folder: Path, temporary: Path) -> None:
    """Give a finished folder its name; what had the name is moved aside first, since folders cannot be overwritten."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(aside)
    temporary.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _slug(name: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "concept"
    # peft keeps adapters in a ModuleDict, which has no room for the names of its own attributes.
    return f"{slug}-concept" if hasattr(nn.ModuleDict(), slug) else slug
