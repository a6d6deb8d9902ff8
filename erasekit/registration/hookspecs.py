"""The ten hooks of a plugin. A plugin is a module with some of these functions, each marked with `@erasekit.hookimpl`.

Registration imports no torch: a target is the text "module:attribute", loaded when somebody chooses its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import typer

    from erasekit.events import Event, Run

hookspec = pluggy.HookspecMarker("erasekit")
hookimpl = pluggy.HookimplMarker("erasekit")


class Register(Protocol):
    """Adds one name to a registry."""

    def __call__(self, name: str, target: Any, *, aliases: Sequence[str] = (), summary: str = "", paper: str = "") -> None:
        """Register `target` ("module:attribute", or the object itself) as `name`.

        Raises:
            DuplicateName: somebody else has registered the name.
        """


class RegisterComponent(Protocol):
    """Adds one choice for a slot of a method."""

    def __call__(self, slot: str, name: str, target: Any, *, summary: str = "", paper: str = "", version: int = 1) -> None:
        """Register `target` as the choice `name` of `slot`; another `version` makes other runs of those that use it.

        Raises:
            DuplicateName: somebody else has registered the choice.
        """


@hookspec
def register_backbones(register: Register) -> None:
    """Register text-to-image models: classes with the `Backbone` protocol."""


@hookspec
def register_methods(register: Register) -> None:
    """Register erasure methods: subclasses of `Method`."""


@hookspec
def register_components(register: RegisterComponent) -> None:
    """Register choices for the slots of a method, e.g. `register("refine", "mine", "my_package:mine")`."""


@hookspec
def register_tasks(register: Register) -> None:
    """Register tasks as "domain/name", e.g. "mini/objects": subclasses of `Task`, or TOML files beside the plugin's module."""


@hookspec
def register_evaluators(register: Register) -> None:
    """Register what scores images: subclasses of `Evaluator`."""


@hookspec
def register_attacks(register: Register) -> None:
    """Register what tries to bring an erased concept back: subclasses of `Attack`."""


@hookspec
def register_exporters(register: Register) -> None:
    """Register forms that an erasure can be written in: subclasses of `erasekit.erasures.exporting.Exporter`."""


@hookspec
def register_launchers(register: Register) -> None:
    """Register ways of running on a cluster."""


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands to the command line. Use Typer's objects only: it ships a click of its own."""


@hookspec
def on_event(event: Event, run: Run) -> None:
    """Hear what happens in a run (see `erasekit.events`). An error here is logged once and never ends the run."""
