"""How much memory and disk there is, and how much was used."""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path

from erasekit.errors import EnvironmentProblem


def peak_memory_mb() -> float:
    """The most memory that this process has held: of the GPU if one was used, else of the machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def check_disk(folder: Path, *, pictures: int, size: int) -> None:
    """See that `pictures` PNGs of side `size` fit on the disk of `folder`, with 100 MB to spare for the erasure and the report.

    Raises:
        EnvironmentProblem: they do not.
    """
    need_mb = 100 + pictures * size * size * 3 / 1e6
    free_mb = shutil.disk_usage(folder).free / 1e6
    if free_mb < need_mb:
        numbers = f"The run needs about {need_mb:.0f} MB in '{folder}', which has {free_mb:.0f} MB free."
        raise EnvironmentProblem(f"{numbers} Free some or choose another folder with --out.")
