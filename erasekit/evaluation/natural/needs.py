"""What evaluators of natural images need from outside: packages of an extra, weights, images of the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from erasekit.errors import EnvironmentProblem, UsageError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def package(module: str, *, extra: str) -> Any:
    """Import a module of a package that an extra installs.

    Raises:
        EnvironmentProblem: it is not there, or cannot be loaded; says which extra has it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = f"'{module.partition('.')[0]}' cannot be imported ({error})"
        raise EnvironmentProblem(f"{missing}. Install it: pip install 'erasekit[{extra}]'.") from error


def package_folder(module: str, *, extra: str) -> Path:
    """The folder of a package that an extra installs, which need not be importable itself.

    Raises:
        EnvironmentProblem: it is not there.
    """
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise EnvironmentProblem(f"'{module}' is not installed. Install it: pip install 'erasekit[{extra}]'.")
    return Path(found.submodule_search_locations[0])


def release(distribution: str, *, extra: str, expected: str = "") -> str:
    """The version of an installed distribution.

    Args:
        distribution: its name.
        extra: the extra that installs it.
        expected: the only version whose numbers are those of the protocol, if there is one.

    Raises:
        EnvironmentProblem: another version is installed.
    """
    found = version(distribution)
    if expected and found != expected:
        raise EnvironmentProblem(
            f"The protocol is of {distribution} {expected}; {found} is installed. Install it: pip install 'erasekit[{extra}]'."
        )
    return found


def sha256(path: Path) -> str:
    """The sha256 of a file.

    Raises:
        EnvironmentProblem: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EnvironmentProblem(
            f"Weights '{path.name}' cannot be read: {error.strerror}. Install or download them."
        ) from error


def checked(path: Path, digest: str, *, remedy: str) -> Path:
    """A file of weights, if it is the one whose sha256 begins with `digest`.

    Raises:
        EnvironmentProblem: it is missing or another one; ends with `remedy`.
    """
    if not path.is_file():
        raise EnvironmentProblem(f"The weights '{path.name}' are missing. {remedy}")
    if not (found := sha256(path)).startswith(digest):
        raise EnvironmentProblem(f"The weights '{path.name}' are damaged (sha256 {found[:8]}, not {digest[:8]}). {remedy}")
    return path


def downloaded(url: str) -> tuple[Path, str]:
    """Where torch keeps the weights of an address, and what to do if they cannot be loaded; those that are there are checked.

    Raises:
        EnvironmentProblem: they are there and damaged: torch looks at the hash in a file's name only when it downloads it.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    remedy = f"Go online once, or put {url} into '{path.parent}'."
    if path.is_file():
        checked(path, path.stem.rpartition("-")[2], remedy=remedy)
    return path, remedy


@contextmanager
def had(what: str, remedy: str) -> Iterator[None]:
    """Turn what goes wrong while weights are loaded or downloaded into one line, which ends with `remedy`.

    Raises:
        EnvironmentProblem: anything went wrong.
    """
    try:
        yield
    except EnvironmentProblem:
        raise
    except Exception as error:  # a download fails in as many ways as there are libraries
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvironmentProblem(f"{what} cannot be loaded: {first.rstrip('.')}. {remedy}") from error


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and below it, in order of their names."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def albums(folder: str, *, setting: str, holds: str) -> dict[str, list[Path]]:
    """The images of the user's in the sub-folders of a folder, by the names of the sub-folders.

    Args:
        folder: of the user's.
        setting: what the user writes to name it.
        holds: what each sub-folder holds, for the message.

    Raises:
        UsageError: there is no such folder, or no sub-folder with an image in it.
    """
    root = Path(folder).expanduser()
    wanted = f"Give {setting}=FOLDER, with a folder of {holds} for each name in it"
    if not folder or not root.is_dir():
        raise UsageError(f"{wanted}; given '{folder}'." if folder else f"{wanted}.")
    found = {sub.name: files for sub in sorted(root.iterdir()) if sub.is_dir() and (files := image_files(sub))}
    if not found:
        raise UsageError(f"There is no image in a sub-folder of '{folder}'. {wanted}.")
    return found


def read(path: Path) -> np.ndarray:
    """An image of the user's as (h, w, 3) uint8.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"Cannot read the image '{path}'. Replace or remove it.") from error


def digest_of(named: Sequence[tuple[str, Path]]) -> str:
    """One sha256 over names and the bytes of files: what a user's images are, wherever they lie."""
    return hashlib.sha256("\n".join(f"{name} {sha256(path)}" for name, path in named).encode()).hexdigest()


def as_arrays(images: torch.Tensor) -> list[np.ndarray]:
    """(n, 3, h, w) uint8 as n contiguous arrays (h, w, 3), RGB."""
    return [np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
