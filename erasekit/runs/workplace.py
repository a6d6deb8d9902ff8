"""Where `erase` keeps the checkpoints of a training until the erasure is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from erasekit.atomic import lock_of
from erasekit.runs.rundir import AtWork


def place_of(out: Path) -> Path:
    """The folder beside an erasure in which its training is kept."""
    out = out.absolute()
    return out.with_name(f".{out.name}.unfinished")


@contextmanager
def workplace(out: Path, plan: str) -> Iterator[Path]:
    """A folder for checkpoints beside `out`, nobody else's meanwhile; what an interrupted attempt at the same left is in it.

    It is gone when the block ends without an error, and also with one if there is no checkpoint in it.

    Args:
        out: where the erasure will be.
        plan: the hash of what is computed; checkpoints of anything else are removed.

    Raises:
        AtWork: another process is at work on `out`.
    """
    place = place_of(out)
    lock = lock_of(place / "work")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AtWork(f"Another process is at work on '{out}'. Wait for it, or give another folder with --out.") from None
    try:
        for other in place.iterdir():
            if other.is_dir() and other.name != plan:
                shutil.rmtree(other)
        (place / plan).mkdir(exist_ok=True)
        yield place / plan
        shutil.rmtree(place)
    finally:
        if place.is_dir() and not kept(place / plan):
            shutil.rmtree(place, ignore_errors=True)
        lock.release()


def kept(folder: Path) -> bool:
    """Whether a training can go on from what is in a folder."""
    return any((folder / "checkpoints").glob("*.safetensors"))
