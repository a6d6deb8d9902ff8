"""Names and what they stand for: lazy targets, aliases, and who registered them."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from erasekit.errors import EnvironmentProblem, UsageError, unknown


class DuplicateName(UsageError):
    """Two plugins registered the same name."""


class BrokenPlugin(EnvironmentProblem):
    """A plugin, or what it registered, cannot be loaded.

    Attributes:
        details: the plugin's own traceback.
    """

    def __init__(self, message: str, details: str) -> None:
        """One line, and the traceback that belongs to it."""
        super().__init__(message)
        self.details = details


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        name: the name; "slot/name" for a component, "domain/name" for a task.
        target: "module:attribute", the path of a TOML file (of a task), or the object itself.
        plugin: the plugin that registered it.
        source: that plugin's distribution or file.
        aliases: other names for the same thing.
        summary: one line for `erasekit ls`.
        paper: where it was published.
        version: of a component, raised when it gives other results; part of the hash of a run.
        kind: what the class has to be called like, e.g. "method": its `name` is the registered one (of a task with its domain
            in front); "" for things without a name of their own.
    """

    name: str
    target: Any
    plugin: str
    source: str
    aliases: tuple[str, ...] = ()
    summary: str = ""
    paper: str = ""
    version: int = 1
    kind: str = ""

    def load(self) -> Any:
        """The object behind the name; of a TOML file its path.

        Raises:
            BrokenPlugin: it cannot be imported, there is no such file, or it has another name than the registered one.
        """
        if not isinstance(self.target, str):
            return self._named(self.target)
        if self.target.endswith(".toml"):
            if not Path(self.target).is_file():
                raise BrokenPlugin(f"'{self.name}' of {self.source} has no file '{Path(self.target).name}'.", "")
            return Path(self.target)
        module, _, attribute = self.target.partition(":")
        try:
            found = getattr(import_module(module), attribute)
        except (Exception, SystemExit) as error:
            message = f"'{self.name}' of {self.source} cannot be loaded: {type(error).__name__}: {error}"
            raise BrokenPlugin(" ".join(message.split()), traceback.format_exc()) from error
        return self._named(found)

    @property
    def module(self) -> str:
        """The module that the target is in; "" of a TOML file."""
        if isinstance(self.target, str):
            return "" if self.target.endswith(".toml") else self.target.partition(":")[0]
        found: str = getattr(self.target, "__module__", None) or type(self.target).__module__
        return found

    def _named(self, found: Any) -> Any:
        """What was found, if it has the name that it is registered under: results and files are named by either."""
        own = getattr(found, "name", None)
        if self.kind == "task":
            own = f"{getattr(found, 'domain', None)}/{own}"
        if self.kind and own != self.name:
            called = getattr(found, "__name__", type(found).__name__)
            line = (
                f"The {self.kind} '{self.name}' of {self.source} is '{called}', which has the name '{own}'. Give both one name."
            )
            raise BrokenPlugin(line, "")
        return found


class Names:
    """Names of one kind of thing, and who registered them."""

    def __init__(self, kind: str, plural: str, *, named: bool = False) -> None:
        """`kind` is what error messages call it, `plural` its name in `erasekit ls`; `named`: it has a name of its own."""
        self.named = named
        self.kind = kind
        self.plural = plural
        self._entries: dict[str, Entry] = {}
        self._names: dict[str, str] = {}  # every name and alias -> the entry's own name
        self.broken: dict[str, BrokenPlugin] = {}  # plugins that failed, by name: a missing name may be theirs

    def add(self, entry: Entry) -> None:
        """Add one entry.

        Raises:
            DuplicateName: its name or an alias is taken; names both owners.
            BrokenPlugin: it is an object (no lazy target) of another name.
        """
        for name in (entry.name, *entry.aliases):
            if name in self._names:
                first = self._entries[self._names[name]]
                owners = f"'{first.plugin}' ({first.source}) and '{entry.plugin}' ({entry.source})"
                raise DuplicateName(f"The {self.kind} '{name}' is registered by both {owners}. Rename or disable one.")
        entry = replace(entry, kind=self.kind) if self.named else entry
        if not isinstance(entry.target, str):
            entry.load()
        self._entries[entry.name] = entry
        self._names |= dict.fromkeys((entry.name, *entry.aliases), entry.name)

    def remove(self, plugin: str) -> None:
        """Forget everything that `plugin` registered."""
        self._entries = {k: e for k, e in self._entries.items() if e.plugin != plugin}
        self._names = {k: v for k, v in self._names.items() if v in self._entries}

    def entries(self) -> list[Entry]:
        """All entries, by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    def entry(self, name: str) -> Entry:
        """The entry that `name` or an alias stands for.

        Raises:
            UsageError: nobody registered it; says the nearest known name.
            BrokenPlugin: nobody registered it, and a plugin of that name is broken.
        """
        if name in self._names:
            return self._entries[self._names[name]]
        if name in self.broken:
            raise self.broken[name]
        raise unknown(self.kind, name, self._names, f"erasekit ls {self.plural}")


class Registry(Names):
    """Things with a plain name."""

    def get(self, name: str) -> Any:
        """The object that `name` or an alias stands for.

        Raises:
            UsageError: nobody registered it.
            BrokenPlugin: it cannot be imported.
        """
        return self.entry(name).load()


class ComponentRegistry(Names):
    """Choices for the slots of methods; the key of a choice is "slot/name"."""

    def choices(self, slot: str) -> list[str]:
        """The names registered for a slot."""
        return [e.name.partition("/")[2] for e in self.entries() if e.name.startswith(f"{slot}/")]

    def entry_of(self, slot: str, name: str) -> Entry:
        """The entry of the choice `name` of `slot`.

        Raises:
            UsageError: the slot has no such choice; says the nearest one.
        """
        if name not in self.choices(slot):
            raise unknown(f"choice for '{slot}'", name, self.choices(slot), "erasekit ls components")
        return self.entry(f"{slot}/{name}")

    def get(self, slot: str, name: str) -> Any:
        """The callable registered as the choice `name` of `slot`.

        Raises:
            UsageError: the slot has no such choice; says the nearest one.
            BrokenPlugin: it cannot be imported.
        """
        return self.entry_of(slot, name).load()


class TaskRegistry(Names):
    """Tasks; the key of a task is "domain/name"."""

    def get(self, name: str, domain: str) -> Any:
        """The task `name` in `domain`; `name` may be written in full.

        Raises:
            UsageError: the domain has no such task; says the nearest one.
            BrokenPlugin: it cannot be imported.
        """
        here = [e.name.removeprefix(f"{domain}/") for e in self.entries() if e.name.startswith(f"{domain}/")]
        short = name.removeprefix(f"{domain}/")
        if short in here:
            return self.entry(f"{domain}/{short}").load()
        elsewhere = [e.name for e in self.entries() if e.name == name or e.name.partition("/")[2] == name]
        if elsewhere:
            own = f"which has {', '.join(sorted(here))}" if here else "which has none"
            raise UsageError(f"The task '{elsewhere[0]}' is not of the backbone's domain '{domain}', {own}.")
        raise unknown(f"{domain} task", name, here, "erasekit ls tasks")
