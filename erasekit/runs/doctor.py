"""Looks at the machine and says what would stand in the way of a run: also what a bug report needs, without private paths."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from erasekit.registration.plugins import Registries
from erasekit.registration.registry import BrokenPlugin, Entry
from erasekit.runs.rundir import LIBRARIES, environment

PATHS = re.compile(r"(?<![\w.:/\\~])(?:~|[A-Za-z]:)?[\\/](?:[^\s'\"()<>:,;\\/]+[\\/])*")  # what stands before a file's name
OPTIONAL = re.compile(r"([\w.-]+).*\bextra == ['\"]([\w-]+)['\"]")  # a requirement, and the extra that it is of


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: `ok`, `warning` (some runs would fail) or `problem` (every run would).
        detail: what was found, and what to do about it.
    """

    name: str
    status: Literal["ok", "warning", "problem"]
    detail: str


def diagnose(registries: Registries, out: Path) -> list[Check]:
    """All checks: versions, device, disk, plugins, and that everything registered can be imported."""
    versions = environment()["versions"]
    checks = [Check("system", "ok", platform.platform()), Check("python", "ok", platform.python_version())]
    for name in ("erasekit", *LIBRARIES):
        found = versions[name]
        checks.append(Check(name, "ok", found) if found else Check(name, "problem", f"not installed; run 'pip install {name}'"))
    checks += [*_extras(), *_variables(), _device(), _disk(out)]
    checks += [*_plugins(registries), *_targets(registries), *_shipped(registries)]
    return [check._replace(detail=without_folders(check.detail)) for check in checks]


def without_folders(text: str) -> str:
    """A text without the folders of this machine: of a path the file's name stays."""
    for folder in {os.fspath(Path.home()), os.getcwd()} - {os.sep}:
        text = text.replace(folder + os.sep, "")
    return PATHS.sub("", text)


def _extras() -> list[Check]:
    """Which extras are installed, and which of their packages."""
    try:
        wanted = requires("erasekit") or []
    except PackageNotFoundError:
        return []
    packages: dict[str, list[str]] = defaultdict(list)
    for line in wanted:
        if (found := OPTIONAL.match(line)) and found[2] not in ("dev", "evaluators"):
            packages[found[2]].append(found[1])
    return [Check(f"extra {name}", "ok", ", ".join(map(_installed, each))) for name, each in sorted(packages.items())]


def _installed(distribution: str) -> str:
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return f"no {distribution}"


def _variables() -> list[Check]:
    """Environment variables that erasekit reads and that are set."""
    return [Check(name, "ok", value) for name, value in sorted(os.environ.items()) if name.startswith("ERASEKIT_")]


def _device() -> Check:
    try:
        import torch
    except Exception as error:
        return Check("device", "problem", f"torch cannot be imported: {error}")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Check("device", "ok", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    return Check("device", "ok", f"cpu, {torch.get_num_threads()} threads; the mini backbones are made for it")


def _disk(out: Path) -> Check:
    folder = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(folder).free / 2**30
    return Check("disk", "ok" if free > 1 else "warning", f"{free:.1f} GiB free for runs")


def _plugins(registries: Registries) -> list[Check]:
    return [
        Check(f"plugin {p.name}", "problem" if p.status == "broken" else "ok", p.error or f"{p.source}, {p.status}")
        for p in registries.found
    ]


def _targets(registries: Registries) -> list[Check]:
    """One line per kind of registered thing: how many there are, and which cannot be imported."""
    checks = []
    for names in registries.all():
        faults = [fault for entry in names.entries() if (fault := _import_fault(entry))]
        if names.entries():
            detail = " ".join(faults) or f"{len(names.entries())} can be imported"
            checks.append(Check(names.plural, "warning" if faults else "ok", detail))
    return checks


def _shipped(registries: Registries) -> list[Check]:
    """Whether the weights of backbones that bring their own are there."""
    checks = []
    for entry in registries.backbones.entries():
        folder = "" if _import_fault(entry) else getattr(entry.load(), "path", "")
        if Path(folder).is_absolute():
            there = (Path(folder) / "model_index.json").is_file()
            detail = "its weights are there" if there else "its weights are missing; install erasekit again"
            checks.append(Check(f"backbone {entry.name}", "ok" if there else "warning", detail))
    return checks


def _import_fault(entry: Entry) -> str:
    try:
        entry.load()
    except BrokenPlugin as error:
        return str(error)
    return ""
