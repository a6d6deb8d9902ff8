"""Which run has computed which erasure: each says so in its own `computed.json`, and nothing else points to it.

So a run that is deleted, damaged or begun anew is simply not found.
"""

from __future__ import annotations

from pathlib import Path

from erasekit.runs.plan import Plan
from erasekit.runs.records import Computed, read_whole
from erasekit.runs.rundir import path_of

COMPUTED = "computed.json"
RUNS = "[0-9a-f]" * 8  # folders of runs, not of those that are being removed


def offered(out: Path, plan: Plan) -> list[tuple[Path, Computed]]:
    """Runs under `out` that say they have the erasure of a plan, the one computed last first; their files are not looked at."""
    found = []
    for path in path_of(out, plan).parent.glob(f"{RUNS}/{COMPUTED}"):
        record = read_whole(Computed, path)
        if record and record.erasing == plan.erasing and (path.parent / "erasure" / "erasure.json").is_file():
            found.append((path.parent, record))
    return sorted(found, key=lambda run: run[1].computed, reverse=True)


def taken(path: Path, sha256: str) -> Computed | None:
    """Who has computed the erasure of the run in a directory, and what it took, if another run has; None if this one has."""
    record = read_whole(Computed, path / COMPUTED)
    return record if record and record.erasure_sha256 == sha256 and record.run != path.name else None
