"""Files and folders that are whole or not there: written under a temporary name, then renamed; and locks."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLease, Timeout

from erasekit.errors import UsageError

LOCKS = ("system", "lease")
LEASE_S = 120.0

LONGEST = len(f"..{'0' * 8}-{2**22}.tmp")  # what a temporary name adds to a name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes the name `path` when the block ends without an error.

    The temporary name says whose it is: processes in two containers may have one number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name when the block ends without an error.

    What had the name is moved aside first, since folders cannot be overwritten, and then removed. Whoever calls this has
    seen to it that it may be. What a killed process left of this is removed, or put back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, folder.name)
    temporary = _beside(folder, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        remove(folder, then=temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path, *, then: Path | None = None) -> None:
    """Remove a folder so that it is never there in part; `then` takes its name at once."""
    aside = _beside(folder, "tmp" if then is None else "old")
    if folder.exists():
        folder.rename(aside)
    if then is not None:
        try:
            then.rename(folder)
        except OSError:
            if aside.exists():
                aside.rename(folder)
            raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """What has the name `path` is out of the way within the block: gone after it, and back if the block ends with an error.

    What a killed process left of this is put back by `sweep_beside`.
    """
    aside = _beside(path, "old")
    if path.exists():
        path.rename(aside)
    try:
        yield
    except BaseException:
        if aside.exists():
            _remove(path)
            aside.rename(path)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, name: str = "", *, locked: bool = False) -> None:
    """Remove the temporary files and folders that processes left in `folder` when they were killed.

    Args:
        folder: where to look, not below it.
        name: only those for this name.
        locked: nobody else can be at work here, so that every temporary name is left over; else those of living processes
            stay, and those of other machines and containers, whose processes cannot be seen. Our own are left over: from a
            process that had the same number.
    """
    pattern = re.compile(rf"\.({re.escape(name) if name else '.+'})\.([0-9a-f]{{8}})-(\d+)\.(tmp|old)")
    for path in folder.iterdir():
        found = pattern.fullmatch(path.name)
        if found is None or not (locked or (found[2] == _here() and _over(int(found[3])))):
            continue
        if found[4] == "old" and not (folder / found[1]).exists():
            path.rename(folder / found[1])  # killed between moving the old one aside and giving its name to the new one
        else:
            _remove(path)


def sweep_beside(path: Path) -> None:
    """`sweep` for one name, wherever it is: what a killed process left of it is removed or put back."""
    whole = Path(os.path.realpath(path))
    if whole.parent.is_dir() and whole.name:
        sweep(whole.parent, whole.name)


def sweep_below(folder: Path) -> None:
    """`sweep` a folder and all in it, where nobody else can be at work."""
    for place, _, _ in os.walk(folder, topdown=False):
        sweep(Path(place), locked=True)


def linked(source: Path, target: Path) -> Path:
    """The same file under a second name; a copy, where the disk has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def lock_of(path: Path) -> Any:
    """The lock of a file or folder, to be acquired: one holder among all processes that see the disk.

    It is the operating system's by default, and gone with the process that held it, however that ended. Where several
    machines share a disk on which the system's locks do not reach from one to another, `ERASEKIT_LOCKS=lease` writes them
    down instead: a holder refreshes its claim, and one that was not refreshed for two minutes may be taken over.

    Raises:
        UsageError: `ERASEKIT_LOCKS` names no such kind.
    """
    kind, file = os.environ.get("ERASEKIT_LOCKS", "system"), path.with_name(f".{path.name}.lock")
    if kind not in LOCKS:
        raise UsageError(f"ERASEKIT_LOCKS is '{kind}'. Set it to one of: {', '.join(LOCKS)}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file) if kind == "system" else SoftFileLease(file, lease_duration=LEASE_S)


def one_by_one(folders: Sequence[Path]) -> Iterator[int]:
    """The indices of folders, each while nobody else is at it; those that others are at come last, once they are left."""
    taken: list[int] = []
    for wait, indices in ((0, range(len(folders))), (-1, taken)):
        for i in indices:
            lock = lock_of(folders[i])
            try:
                lock.acquire(timeout=wait)
            except Timeout:
                taken.append(i)
                continue
            try:
                yield i
            finally:
                lock.release()


def disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full: safetensors wraps the system's error in one of its own."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{_here()}-{os.getpid()}.{kind}")


@cache
def _here() -> str:
    """Stands for where process ids mean what they mean to us: this machine since it was started, and the container on it."""
    known = [platform.node()]
    with suppress(OSError):  # other systems than Linux have neither
        known += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(os.stat("/proc/self/ns/pid").st_ino)]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def _over(process: int) -> bool:
    """Whether a process has ended, or is this one."""
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's, or no number of a process
        return False
    return False
