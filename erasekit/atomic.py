"""Files that are whole or not there: written under a temporary name, then renamed; files under two names; and locks."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLease

from erasekit.errors import UsageError

LOCKS = ("system", "lease")
LEASE_S = 120.0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes the name `path` when the block ends without an error.

    The temporary name is drawn at random: processes in two containers may have one number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
