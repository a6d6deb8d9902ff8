"""Checkpoints of one `.safetensors` file, as Stable Diffusion's model sites share them, as diffusers folders."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from erasekit.atomic import replacing_folder
from erasekit.backbones.shards import read_header
from erasekit.errors import EnvironmentProblem
from erasekit.quiet import quiet

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def unpack(pipeline_class: Any, file: Path, like: str, **left_out: None) -> Path:
    """The diffusers folder of a single-file checkpoint: converted by diffusers once, then kept in the hub's cache.

    Args:
        pipeline_class: the diffusers pipeline.
        file: the checkpoint.
        like: hub id or folder of a pipeline whose configs and tokenizer belong to it.
        left_out: parts of the pipeline that are not wanted, as None.

    Raises:
        EnvironmentProblem: the file is cut, no such checkpoint, or the configs cannot be loaded.
    """
    try:
        header, _ = read_header(file)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        digest.update(like.encode())
        folder = Path(HF_HUB_CACHE) / "erasekit" / digest.hexdigest()[:16]
        if not (folder / "model_index.json").is_file():
            kinds = Counter(entry["dtype"] for entry in header.values())
            dtype = _DTYPES.get(kinds.most_common(1)[0][0], torch.float32)
            with quiet():
                pipe = pipeline_class.from_single_file(str(file), config=like, torch_dtype=dtype, **left_out)
                with replacing_folder(folder) as temporary:
                    pipe.save_pretrained(temporary)
    except Exception as error:  # diffusers raises whatever its conversion stumbles over
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(
            f"'{file}' could not be read as a single-file {pipeline_class.__name__} with the configs of '{like}' ({first}). "
            f"Name a folder or hub id that it belongs to: -s backbone.like=FOLDER"
        ) from error
    return folder
