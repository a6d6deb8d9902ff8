"""How a measurement is written down: what made it, on which machine, as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What a time depends on."""
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write a result to `path`, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
