"""The run that is open: what is to be done, where it is kept, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from erasekit.evaluation.tasks import Prompt
from erasekit.events import Event
from erasekit.registration.plugins import Registries
from erasekit.runs.plan import Plan
from erasekit.runs.ready import evaluation_prompts
from erasekit.runs.rundir import RunDirectory


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        plan: names looked up, settings checked.
        registries: what names stand for.
        directory: where everything is kept.
        emit: tells the log, the command line and the plugins.
    """

    plan: Plan
    registries: Registries
    directory: RunDirectory
    emit: Callable[[Event], None]

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts that are measured on."""
        return evaluation_prompts(self.plan)
