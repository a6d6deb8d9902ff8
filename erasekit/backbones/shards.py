"""Single tensors from safetensors files, without the rest of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes begin.

    Raises:
        ValueError: the file is cut or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length)) if length < size else {}
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=-1)
    if 8 + length + end != size:
        raise ValueError(f"'{path.name}' is cut or damaged.")
    return header, 8 + length


def read_tensor(files: Mapping[str, Path], key: str) -> torch.Tensor:
    """One tensor from its file, and no other byte: safetensors maps the file whole, which a small machine refuses for FLUX."""
    header, start = read_header(files[key])
    entry = header[key]
    first, last = entry["data_offsets"]
    with files[key].open("rb") as file:
        file.seek(start + first)
        data = bytearray(file.read(last - first))
    return torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
