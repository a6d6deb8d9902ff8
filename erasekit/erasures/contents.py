"""What lies in an erasure's folder, held against its manifest before anything in it is believed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from erasekit.backbones.protocol import Backbone
from erasekit.documents import Damaged, plain_file
from erasekit.erasures import tensors
from erasekit.erasures.deltas import Deltas, LowRank, norm, scale, shape, summed
from erasekit.erasures.manifest import ADVICE, ALL, CARD, MANIFEST, file_stems
from erasekit.errors import EnvironmentProblem, UsageError

LARGEST = 2**36  # bytes of a tensor file: twice FLUX.1's transformer in float32
# Of the sum of two parts, |all - sum| / sum of |part|: what rounding explains in the type of the files.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
BESIDE = ("", ".md", ".txt", ".png", ".jpg", ".jpeg", ".webp")  # endings of files that nothing loads: cards, licences, images


def check_file(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """See that a file of an erasure is a plain file, and what was written.

    Raises:
        EnvironmentProblem: it is not.
    """
    try:
        plain_file(folder / name, most=LARGEST)
        with (folder / name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EnvironmentProblem(f"'{folder / name}' cannot be read ({error.strerror}). Copy the erasure again.") from error
    if sha256 != manifest["files"][name]:
        raise Damaged(f"'{folder / name}' is damaged: its SHA-256 is not the recorded one. Copy the erasure again.")


def check_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """See that a folder holds the files of the manifest and nothing else that could be loaded, by links or otherwise.

    Names that begin with a dot are what the hub's tools leave; nobody here reads them.

    Raises:
        EnvironmentProblem: says which file is missing, changed, a link or a device, or not listed.
    """
    for path in _entries(folder):
        name = path.relative_to(folder).as_posix()
        if name not in manifest["files"] and name not in (MANIFEST, CARD) and path.suffix.lower() not in BESIDE:
            raise Damaged(f"'{path}' is no part of the erasure: {MANIFEST} does not list it. Move it elsewhere.")
    for name in manifest["files"]:
        check_file(folder, manifest, name)


def _entries(folder: Path) -> Iterator[Path]:
    """Every file in the folder and in its `parts`, none of them a link or a device."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False) and entry.name == "parts" and folder.name != "parts":
            yield from _entries(path)
        elif not entry.is_dir(follow_symlinks=False):
            plain_file(path, most=LARGEST)
            yield path


def read_deltas(folder: Path, manifest: Mapping[str, Any], base: Backbone | None = None) -> dict[str, dict[str, Deltas]]:
    """The deltas of every concept and part, after `check_folder`.

    Every file is read and held against the others: each tensor finite and of its layer's shape, the settings in the file's
    head those of its tensors, the layers those whose hash the base was compared by, a concept's file the sum of its parts, and
    `all.safetensors` the sum of all.

    Raises:
        EnvironmentProblem: says which file is wrong, and how.
    """
    found: dict[str, Deltas] = {name: dict(_read(folder, name, manifest)) for name in manifest["files"]}
    if {module for deltas in found.values() for module in deltas} != set(manifest["base"]["modules"]):
        raise Damaged(f"'{folder}' changes other layers than {MANIFEST} says. {ADVICE}")
    if base is not None:
        _check_shapes(folder, found, base)
    _check_sums(folder, manifest, found)
    return {entry: {part: found[file] for part, file in files.items()} for entry, files in manifest["parts"].items()}


def _read(folder: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, LowRank]:
    try:
        deltas = tensors.read(folder / name, manifest["denoiser"], dtype=tensors.dtype_of(manifest["dtype"]))
    except ValueError as error:
        raise Damaged(f"'{folder / name}' is damaged: {error}. {ADVICE}") from error
    if max(low.rank for low in deltas.values()) != manifest["ranks"].get(name):
        raise Damaged(f"'{folder / name}' has another rank than {MANIFEST} says. {ADVICE}")
    return deltas


def _check_shapes(folder: Path, found: Mapping[str, Deltas], base: Backbone) -> None:
    """See that every delta is as large as its layer; of one in four bits, only a loaded model knows how large it is."""
    for module in sorted({module for deltas in found.values() for module in deltas}):
        weight = base.weight(module)
        there, packed = tuple(weight.shape), not weight.is_floating_point()
        for name, deltas in found.items():
            if module in deltas and not packed and shape(deltas[module]) != there:
                given = shape(deltas[module])
                raise Damaged(f"'{folder / name}' has {given} for '{module}', which is {there} in the base. {ADVICE}")


def _check_sums(folder: Path, manifest: Mapping[str, Any], found: Mapping[str, Deltas]) -> None:
    stems, hashes = file_stems(list(manifest["parts"])), manifest["files"]
    whole = {entry: f"{stem}.safetensors" for entry, stem in stems.items()}
    sums = {whole[entry]: list(files.values()) for entry, files in manifest["parts"].items()}
    for name, summands in (sums | {ALL: list(whole.values())}).items():
        if [hashes[summand] for summand in summands] == [hashes[name]]:
            continue
        parts = [found[summand] for summand in summands]
        rest = summed([found[name], *(scale(part, -1.0) for part in parts)])
        size = {module: sum(norm(part[module]) for part in parts if module in part) for module in rest}
        if any(norm(rest[module]) > TOLERANCES[manifest["dtype"]] * size[module] for module in rest):
            raise Damaged(f"'{folder / name}' is not the sum of {', '.join(summands)}, as it should be. {ADVICE}")


def copy_erasure(given: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Copy the files of an erasure that was checked, and nothing else; no link is followed."""
    (folder / "parts").mkdir(parents=True)
    for name in (*manifest["files"], MANIFEST):
        shutil.copyfile(given / name, folder / name, follow_symlinks=False)
    if not any((folder / "parts").iterdir()):
        (folder / "parts").rmdir()


def check_replaceable(folder: Path) -> None:
    """See that a folder holds an erasure and nothing else, or nothing, so that another one may take its place.

    Raises:
        UsageError: it is something else, or holds something else; says what.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    advice = "It is not touched: choose another folder with --out."
    if not folder.is_dir():
        raise UsageError(f"'{folder}' is no folder. {advice}")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    if names and MANIFEST not in names:
        raise UsageError(f"'{folder}' holds no erasure, but '{names[0]}'. {advice}")
    for name in names:
        ours = name in (MANIFEST, CARD, "parts", "guidance.json") or name.endswith(".safetensors")
        if not ours or (name.count("/") and not name.startswith("parts/")):
            raise UsageError(f"'{folder}' holds '{name}', which is no part of an erasure. {advice}")
