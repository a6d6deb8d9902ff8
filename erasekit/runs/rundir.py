"""The directory of one run: what is finished is written down, so that a run that was killed goes on where it was."""

from __future__ import annotations

import errno
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from erasekit.atomic import disk_full, lock_of, remove, replacing, sweep, sweep_below
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation.results import read_result
from erasekit.events import Event
from erasekit.runs.config import to_toml
from erasekit.runs.plan import Plan
from erasekit.runs.records import Status, read_whole

RECORDS = ("status.json", "config.toml")  # a folder with one of them is a run's
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "torchmetrics", "numpy", "pillow")


class AtWork(EnvironmentProblem):
    """Another process is at work on a run."""


class RunDirectory:
    """An open run directory. Use `open_run` to get one.

    Attributes:
        path: where it is.
        state: `new`, `partial` (some stages are done) or `finished`.
        timings_s: seconds that each stage took, over all attempts.
        starts: how often it was begun since a stage was last finished; more than one says that a process was lost.
    """

    def __init__(self, path: Path, status: dict[str, Any]) -> None:
        """Take the directory `path` with what its status.json says."""
        self.path = path
        self.timings_s: dict[str, float] = status.get("timings_s", {})
        self.starts: int = status.get("starts", 0)
        self._finished: list[str] = status.get("finished", [])
        self.state: Literal["new", "partial", "finished"] = "partial" if status else "new"
        if status.get("state") == "finished" and _has_results(path):
            self.state = "finished"

    def done(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return stage in self._finished

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and note that it is finished if it ends without an error."""
        start = time.monotonic()
        try:
            yield
            if name not in self._finished:
                self._finished.append(name)
                self.starts = 1
        finally:
            self.timings_s[name] = round(self.timings_s.get(name, 0.0) + time.monotonic() - start, 3)
            self.write_status("running")

    def leave_out(self, stage: str, seconds: float) -> None:
        """Take seconds off the stage at work: what they went into is not what it is timed for."""
        self.timings_s[stage] = self.timings_s.get(stage, 0.0) - seconds

    def write_status(self, state: str, error: str = "") -> None:
        """Write status.json: `running`, `failed` or `finished`, and what is done so far."""
        done = {"state": state, "finished": self._finished, "timings_s": self.timings_s, "starts": self.starts}
        write_json(self.path / "status.json", {"schema_version": 1} | done | ({"error": error} if error else {}))

    def log(self, event: Event) -> None:
        """Append an event to log.jsonl."""
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **event.record()}
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")


def path_of(out: Path, plan: Plan) -> Path:
    """Where the run of a plan lives under `out`."""
    return out / plan.config.backbone / plan.task_name / plan.config.method / plan.hash


@contextmanager
def open_run(out: Path, plan: Plan, *, force: bool = False) -> Iterator[RunDirectory]:
    """Open, and lock, the run directory of a plan; `force` begins anew.

    Raises:
        UsageError: the folder cannot be written to.
        AtWork: another process is at work in it.
        EnvironmentProblem: the disk is full.
    """
    path = path_of(out, plan)
    with _full_disk_reported(out), _writable(out):
        lock = lock_of(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise AtWork(f"Another process is at work on '{path}'. Wait for it, or end it.") from None
    try:
        with _full_disk_reported(out):
            with _writable(out):
                run = _prepared(path, plan, force)
            yield run
    finally:
        lock.release()


def _prepared(path: Path, plan: Plan, force: bool) -> RunDirectory:
    sweep(path.parent, path.name, locked=True)
    if force and path.exists():
        if path.is_symlink() or (not any((path / name).is_file() for name in RECORDS) and any(path.iterdir())):
            raise UsageError(f"'{path}' holds no run, so --force does not touch it. Move it elsewhere, or use another --out.")
        remove(path)
    path.mkdir(exist_ok=True)
    sweep_below(path)
    run = RunDirectory(path, read_status(path))
    if not (path / "config.toml").is_file():
        with replacing(path / "config.toml") as temporary:
            temporary.write_text(to_toml(plan.config), encoding="utf-8")
        write_json(path / "env.json", environment())
    if run.state != "finished":
        run.starts += 1
        run.write_status("running")
    return run


def _has_results(path: Path) -> bool:
    """Whether the numbers of a run can be read; those that cannot are measured again."""
    try:
        read_result(path / "results.json")
    except UsageError:
        return False
    return True


def read_status(path: Path) -> dict[str, Any]:
    """What a run directory says of itself; {} if nobody has begun, or if its status.json is damaged: what is done shows."""
    status = read_whole(Status, path / "status.json")
    return status.model_dump(exclude={"schema_version"}) if status else {}


def mark(path: Path, state: Literal["running", "failed"], error: str = "") -> None:
    """Say of a run that nobody has open that it has failed, or that it may be gone on with; what is done stays."""
    path.mkdir(parents=True, exist_ok=True)
    status = read_status(path)
    done = {key: status[key] for key in ("finished", "timings_s") if key in status}
    told: dict[str, Any] = {"error": error} if error else {}
    write_json(path / "status.json", {"schema_version": 1, "state": state, **done, "starts": 0, **told})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            raise
        where = error.filename or out
        raise UsageError(f"Cannot write to '{where}': {error.strerror}. Choose another folder with --out.") from error


@contextmanager
def _full_disk_reported(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not disk_full(error):
            raise
        advice = "Free some space and run the same command again: what is done is kept."
        raise EnvironmentProblem(f"The disk of '{out}' is full. {advice}") from error


def environment() -> dict[str, Any]:
    """Versions and the kind of machine, without names of hosts, users or folders."""
    versions = {name: _version(name) for name in ("erasekit", *LIBRARIES)}
    return {
        "schema_version": 1,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "versions": versions,
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
