"""What a shell completes: registered names with their summaries, those of plugin files on the same line too."""

from __future__ import annotations

from collections.abc import Callable

import typer

from erasekit.errors import ErasekitError
from erasekit.registration.plugins import Registries, default, load


def names(kind: str) -> Callable[[typer.Context, str], list[tuple[str, str]]]:
    """What completes the names of a registry, e.g. `methods`; a task is named as `--task` names it."""

    def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        found: dict[str, list[str]] = {}
        for entry in getattr(_registered(ctx), kind).entries():
            found.setdefault(entry.name.rpartition("/")[2], []).append(entry.summary)
        return [(name, "; ".join(summaries)) for name, summaries in found.items() if name.startswith(incomplete)]

    return complete


def one_of(*values: str) -> Callable[[str], list[str]]:
    """What completes one of a few words."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def kinds(ctx: typer.Context, incomplete: str) -> list[str]:
    """What there is to list."""
    return [names.plural for names in _registered(ctx).all() if names.plural.startswith(incomplete)]


def plugins(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of plugins, broken ones too."""
    return [plugin.name for plugin in _registered(ctx).found if plugin.name.startswith(incomplete)]


def _registered(ctx: typer.Context) -> Registries:
    files = ctx.params.get("plugin")
    try:
        return load(files) if files else default()
    except ErasekitError:  # the file is not there: the command will say so
        return default()
