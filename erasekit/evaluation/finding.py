"""From what a user calls a task to the task: a registered name, or the path of a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erasekit.errors import UsageError
from erasekit.evaluation.declared import Declared
from erasekit.evaluation.tasks import Protocol, Task
from erasekit.registration.owed import owed
from erasekit.registration.plugins import Registries


def find_task(name: str, domain: str, registries: Registries, overrides: Mapping[str, Any] | None = None) -> Task:
    """The task that a name, or the path of a TOML file, stands for in a domain.

    Args:
        name: of a registered task, or a path that ends with ".toml".
        domain: the backbone's.
        registries: what names stand for.
        overrides: keys of the task's file that are otherwise (`-s task.KEY=VALUE`).

    Raises:
        UsageError: there is none, it is of another domain, its file has mistakes, or it has no file to say otherwise.
        BrokenPlugin: it cannot be imported.
    """
    target = Path(name).expanduser() if name.endswith(".toml") else registries.tasks.get(name, domain)
    if isinstance(target, Path):
        declared = Declared(target, overrides)
        if declared.domain != domain:
            raise UsageError(f"The task of '{name}' is of the domain '{declared.domain}', the backbone is of '{domain}'.")
        return declared
    kind: Any = target if isinstance(target, type) else type(target)
    owed(f"The task '{name}'", kind, Task, ("concept", "prompts"))
    if isinstance(kind.evaluators, str):
        raise UsageError(
            f"The task '{name}' has the evaluators '{kind.evaluators}', one text. Give a tuple: ('{kind.evaluators}',)."
        )
    if not isinstance(kind.protocol, Protocol):
        raise UsageError(
            f"The task '{name}' has a protocol that is a {type(kind.protocol).__name__}. Give an erasekit.Protocol."
        )
    task: Task = target() if isinstance(target, type) else target
    if overrides:
        key = next(iter(overrides))
        raise UsageError(f"The task '{task.name}' has no setting 'task.{key}': it is code. Tasks of a TOML file have settings.")
    return task
