"""Whether something can be written in a place: found out before anything is computed, without writing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from erasekit.atomic import LONGEST
from erasekit.errors import UsageError

DEEPEST = 300  # characters that erasekit's own folders and files add below a folder


def check_place(path: Path) -> None:
    """See that a file or folder of this name can be made, and others below it; what is there already is not looked at.

    Raises:
        UsageError: says what is in the way.
    """

    def refused(why: str) -> UsageError:
        return UsageError(f"Cannot write to '{path}': {why}. Choose another place with --out.")

    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):  # not C:/, which is a disk of Windows
        raise refused("it is a URL, and runs need a folder with locks and renames; copy it there afterwards")
    if "\0" in str(path):
        raise refused("the name holds a null byte")
    try:
        whole = Path(os.path.abspath(path))
        there = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
        os.stat(there)  # a link that leads round in a circle, or nowhere
        longest, deepest = os.pathconf("/", "PC_NAME_MAX"), os.pathconf("/", "PC_PATH_MAX")
    except OSError as error:
        raise refused(error.strerror or str(error)) from error
    if not os.path.isdir(there) and there != whole:
        raise refused(f"'{there}' is no folder")
    new = whole.relative_to(there).parts or (whole.name,)
    if any(len(os.fsencode(part)) + LONGEST > longest for part in new):
        raise refused(f"a name may have {longest - LONGEST} bytes")
    if len(os.fsencode(whole)) + DEEPEST > deepest:
        raise refused(f"a path may have {deepest - DEEPEST} bytes")
    folder = there if os.path.isdir(there) else there.parent
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise refused("the disk is mounted read-only")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise refused(f"'{folder}' may not be written to")
