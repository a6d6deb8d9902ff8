"""An erasure that several runs want is computed by the first of them, and copied by the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import Timeout

from erasekit.atomic import disk_full, lock_of, replacing_folder
from erasekit.backbones.memory import peak_memory_mb
from erasekit.backbones.protocol import Backbone
from erasekit.erasures.contents import copy_erasure
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.manifest import read_manifest
from erasekit.errors import ErasekitError
from erasekit.events import Noted
from erasekit.runs.current import Run
from erasekit.runs.offers import COMPUTED, offered
from erasekit.runs.records import Computed
from erasekit.runs.rundir import write_json


@contextmanager
def alone(this: Run) -> Iterator[None]:
    """Nobody else computes the same erasure within the block: one who comes second waits, and will find it."""
    lock = lock_of(this.directory.path.with_name(f"erasing-{this.plan.erasing}"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        this.emit(Noted("Another run is computing the same erasure. This one waits for it."))
        start = time.monotonic()
        lock.acquire()
        this.directory.leave_out("erase", time.monotonic() - start)
    try:
        yield
    finally:
        lock.release()


def take(this: Run, backbone: Backbone, out: Path) -> None:
    """Copy the erasure from a run that has it, if there is one and it is whole there and of these weights."""
    own = this.directory.path
    for run, record in offered(out, this.plan):
        write_json(own / COMPUTED, record.model_dump())  # first, so that nobody who is killed forgets what it took
        try:
            copy_whole(run / "erasure", own / "erasure", backbone, sha256=record.erasure_sha256)
        except (ErasekitError, OSError) as error:
            if disk_full(error):
                raise
            this.emit(Noted(f"Run {run.name} has the same erasure, but damaged or of other weights. It is not taken."))
            continue
        took = f"Run {record.run} has computed this erasure, in {record.erase_s:.1f} s"
        this.emit(Noted(f"{took}. It is taken from run {run.name}; --force computes it anew."))
        return


def copy_whole(given: Path, folder: Path, backbone: Backbone, *, sha256: str = "") -> None:
    """Copy an erasure, checked, so that it is there whole or not at all.

    Args:
        given: the folder of the erasure.
        folder: where to.
        backbone: what it has to be of.
        sha256: which one it has to be; "" is any.

    Raises:
        UsageError: there is none, or it is another one or another base's.
        EnvironmentProblem: it is damaged.
    """
    Erasure.load(given, backbone)
    with replacing_folder(folder) as temporary:
        copy_erasure(given, temporary, read_manifest(given, backbone))
        Erasure.load(temporary, backbone)
        if sha256 and read_manifest(temporary)["erasure_sha256"] != sha256:
            raise ErasekitError(f"'{given}' is another erasure than its run says.")


def note_computed(this: Run, sha256: str, seconds: float) -> None:
    """Write computed.json of an erasure that was computed here, in so many seconds of this attempt."""
    directory, computed = this.directory, datetime.now(UTC).isoformat(timespec="milliseconds")
    record = Computed(
        erasing=this.plan.erasing,
        erasure_sha256=sha256,
        run=directory.path.name,
        computed=computed,
        erase_s=round(directory.timings_s.get("erase", 0.0) + seconds, 3),
        peak_memory_mb=round(peak_memory_mb(), 1),
    )
    write_json(directory.path / COMPUTED, record.model_dump())
