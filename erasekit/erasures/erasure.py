"""An erasure in memory and on disk: one small LoRA file per concept that loads in plain diffusers.

An erasure that acts at sampling time has no such files, but the prompts and settings that it steers by.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from erasekit.atomic import linked, replacing_folder
from erasekit.concepts import Concept
from erasekit.erasures import tensors
from erasekit.erasures.contents import check_folder, check_replaceable, read_deltas
from erasekit.erasures.deltas import Deltas, summed
from erasekit.erasures.guidance import Guidance
from erasekit.erasures.manifest import ALL, CARD, SCHEMA_VERSION, digest, file_stems, read_manifest, slug, write_manifest
from erasekit.erasures.modelcard import model_card
from erasekit.erasures.remains import UNMEASURED, Remains
from erasekit.erasures.tensors import Written
from erasekit.errors import EnvironmentProblem, ErasekitError
from erasekit.evaluation.notebook import shown
from erasekit.events import progress

if TYPE_CHECKING:
    from erasekit.backbones.protocol import Backbone


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
        folder: where it was read from.
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
    folder: Path | None = field(default=None, compare=False, repr=False)

    def _repr_html_(self) -> str:
        """What a notebook shows: what it erases, what it leaves, and the images of the run that it lies in."""
        rows = [[concept.name, concept.kind, ", ".join(concept.phrases)] for concept in self.concepts]
        run = self.folder.parent if self.folder and (self.folder.parent / "results.json").is_file() else None
        left = self.remains.line() if self.remains else UNMEASURED
        title = f"An erasure from {self.backbone} by {self.method} ({self.kind})"
        return shown(title, ["concept", "kind", "words"], rows, run, [left, *self.warnings])

    @property
    def kind(self) -> Literal["weights", "guidance"]:
        """Whether it changes weights, or only how images are drawn."""
        return "weights" if self.guidance is None else "guidance"

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        concepts: Sequence[Concept],
        *,
        method: str,
        config: Mapping[str, Any],
        deltas: Mapping[str, Mapping[str, Deltas]] | None = None,
        guidance: Guidance | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> Erasure:
        """The erasure of concepts from a backbone, by deltas of its weights or by guidance."""
        deltas = deltas or {}
        # Guidance changes no layer; its prompts belong to models whose text sites are the same.
        modules = [site.name for site in backbone.text_sites()] if guidance else _modules(deltas)
        return cls(
            method=method,
            config=config,
            concepts=tuple(concepts),
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
        return summed([part for parts in self.deltas.values() for part in parts.values()])

    def save(self, folder: str | Path, *, dtype: str = "float32") -> str:
        """Write the erasure, replacing what is in `folder`; it appears there whole or not at all.

        The same deltas give the same bytes: time and environment stand in `erasure.json` only.

        Args:
            folder: where to.
            dtype: of the tensors in the files, `float32`, `float16` or `bfloat16`; `erasure.json` says as `rounding` what
                that costs, |rounded - Delta| / |Delta|.

        Returns:
            SHA-256 over the tensor files' names and hashes.

        Raises:
            UsageError: `folder` is something else than an erasure, which is not touched.
            ErasekitError: the erasure holds no deltas, or values that are not finite.
            EnvironmentProblem: the folder cannot be written.
        """
        folder = Path(os.path.realpath(folder))
        check_replaceable(folder)
        try:
            with replacing_folder(folder) as temporary:
                progress("writing", 0, 1)
                record: dict[str, Any] = {"parts": {}}
                if self.guidance:
                    files = self.guidance.write(temporary)
                else:
                    written, parts = self._write_tensors(temporary, tensors.dtype_of(dtype))
                    files = {name: of.sha256 for name, of in written.items()}
                    ranks = {name: of.rank for name, of in written.items()}
                    record = {"parts": parts, "ranks": ranks, "dtype": dtype, "rounding": written[ALL].rounding}
                write_manifest(temporary, self._manifest(files, record))
                (temporary / CARD).write_text(model_card(read_manifest(temporary)), "utf-8")
            progress("writing", 1, 1)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise EnvironmentProblem(f"Cannot write '{folder}': {reason}. Free disk space or choose another folder.") from error
        except ValueError as error:
            raise ErasekitError(f"The erasure cannot be written: {error}.") from error
        return digest(files)

    @classmethod
    def load(cls, folder: str | Path, base: Backbone | None = None) -> Erasure:
        """Read an erasure, every file checked against its hash and against the others (see `contents`).

        Raises:
            UsageError: see `read_manifest`.
            EnvironmentProblem: a file is missing, damaged, or not what the manifest says.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, base)
        check_folder(folder, manifest)
        guidance, deltas = None, {}
        if manifest["kind"] == "guidance":
            guidance = Guidance.read(folder)
        else:
            deltas = read_deltas(folder, manifest, base)
        return cls(
            method=manifest["method"],
            config=manifest["config"],
            concepts=tuple(Concept.model_validate(c) for c in manifest["concepts"]),
            backbone=manifest["backbone"],
            prefix=manifest["denoiser"],
            base=manifest["base"],
            deltas=deltas,
            guidance=guidance,
            figures=manifest["figures"],
            remains=None if manifest["residual"] is None else Remains(**{k: manifest[k] for k in ("residual", "drift")}),
            warnings=tuple(manifest["warnings"]),
            folder=folder,
        )

    def _write_tensors(self, folder: Path, dtype: torch.dtype) -> tuple[dict[str, Written], dict[str, dict[str, str]]]:
        """Write all tensor files; what each holds, and which file holds which part of which concept."""
        files: dict[str, Written] = {}
        parts: dict[str, dict[str, str]] = {}
        stems = file_stems(list(self.deltas))
        for entry, own in self.deltas.items():
            whole = f"{stems[entry]}.safetensors"
            files[whole] = tensors.write(folder / whole, summed(list(own.values())), self.prefix, dtype)
            parts[entry] = {part: f"parts/{stems[entry]}.{slug(part)}.safetensors" if len(own) > 1 else whole for part in own}
            named = {parts[entry][part]: deltas for part, deltas in own.items()} if len(own) > 1 else {}
            files |= {name: tensors.write(folder / name, deltas, self.prefix, dtype) for name, deltas in named.items()}
        if len(self.deltas) == 1:  # the concept's file is the sum
            linked(folder / whole, folder / ALL)
            files[ALL] = files[whole]
        else:
            files[ALL] = tensors.write(folder / ALL, self.total(), self.prefix, dtype)
        return files, parts

    def _manifest(self, files: Mapping[str, str], record: Mapping[str, Any]) -> dict[str, Any]:
        config, figures = _plain(self.config), _plain(self.figures)
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
            "figures": figures,
            "warnings": [" ".join(line.split()) for line in self.warnings],
            **record,
            "files": files,
            "erasure_sha256": digest(files),
            "environment": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "diffusers", "peft")},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _plain(value: Any) -> Any:
    """A value as JSON has it, which knows no infinity: what is not finite becomes null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


def _modules(deltas: Mapping[str, Mapping[str, Deltas]]) -> list[str]:
    """The layers that an erasure touches."""
    return sorted({module for parts in deltas.values() for part in parts.values() for module in part})
