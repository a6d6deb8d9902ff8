"""Diffusers folders: which file holds what, how large a part is, and how a folder is had from the hub."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from erasekit.backbones.shards import read_header
from erasekit.errors import EnvironmentProblem

HALF = "fp16"  # the variant that some folders hold alone
STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers name a part's weights


def tensor_files(folder: Path) -> tuple[dict[str, Path], str | None]:
    """The file that holds each tensor of a part, and the variant that it is of: the main one (None), or else fp16.

    Raises:
        OSError: there is no file.
        ValueError: a file is cut.
    """
    for variant in (None, HALF):
        names = [stem if variant is None else f"{stem}.{variant}" for stem in STEMS]
        found = (sorted(folder.glob(f"{n}-*-of-*.safetensors")) or [*folder.glob(f"{n}.safetensors")] for n in names)
        paths = next((some for some in found if some), [])
        if paths:
            return {key: path for path in paths for key in read_header(path)[0]}, variant
    raise FileNotFoundError(f"There are no safetensors files in '{folder.name}'.")


def elements(folder: Path) -> int:
    """How many numbers the tensors of a part hold, in whatever type they lie on the disk; 0 without files."""
    try:
        files, _ = tensor_files(folder)
        headers = [read_header(path)[0] for path in dict.fromkeys(files.values())]
    except (OSError, ValueError):
        return 0
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())


def part_config(folder: Path, part: str) -> dict[str, Any]:
    """The config.json of a part."""
    config: dict[str, Any] = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    return config


def local_folder(path: str) -> Path | None:
    """The diffusers folder at a path, None if the path is a hub id.

    Raises:
        EnvironmentProblem: the path is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise EnvironmentProblem(f"'{path}' has no model_index.json; 'backbone.path' needs a diffusers folder or a hub id.")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise EnvironmentProblem(f"There is no folder '{path}'; 'backbone.path' needs a diffusers folder or a hub id.")
    return None


def download(pipeline_class: Any, repo: str, revision: str | None, **left_out: None) -> Path:
    """The local copy of a repository on the hub, without the parts that are left out.

    Raises:
        EnvironmentProblem: it cannot be loaded; says why and what to do.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(pipeline_class.download(repo, revision=revision, use_safetensors=True, **left_out))
    except GatedRepoError as error:
        raise EnvironmentProblem(
            f"{repo} is gated: accept its licence at huggingface.co/{repo}, then run 'hf auth login'."
        ) from error
    except RevisionNotFoundError as error:
        raise EnvironmentProblem(f"{repo} has no revision '{revision}'; check 'backbone.revision'.") from error
    except RepositoryNotFoundError as error:
        raise EnvironmentProblem(
            f"The hub has no repository '{repo}', or it is private: check the name, or run 'hf auth login'."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"'{repo}' could not be downloaded ({first_line(error)}). "
            f"Check the network, or give a local folder: -s backbone.path=FOLDER"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
