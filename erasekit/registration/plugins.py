"""Finds plugins and collects what they register. A plugin that fails is set aside with its traceback; the others go on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from erasekit.errors import ErasekitError, UsageError, nearest
from erasekit.registration import hookspecs
from erasekit.registration.registry import BrokenPlugin, ComponentRegistry, Entry, Names, Registry, TaskRegistry

if TYPE_CHECKING:
    import typer

BUILT_IN = ("erasekit.registration.builtin",)


@dataclass(frozen=True)
class PluginInfo:
    """One plugin that was found.

    Attributes:
        name: name of its entry point, or of its file without ".py".
        source: distribution and version, or the file.
        status: `ok`, `broken` or `disabled`.
        error: why it is broken, in one line.
        details: its traceback.
    """

    name: str
    source: str
    status: str = "ok"
    error: str = ""
    details: str = ""


@dataclass
class Registries:
    """Everything that plugins have registered, handed to whoever looks names up.

    Attributes:
        manager: pluggy's manager, for `register_commands` and `on_event`.
        found: every plugin, broken and disabled ones too.
    """

    manager: pluggy.PluginManager
    found: list[PluginInfo] = field(default_factory=list)
    backbones: Registry = field(default_factory=lambda: Registry("backbone", "backbones", named=True))
    methods: Registry = field(default_factory=lambda: Registry("method", "methods", named=True))
    components: ComponentRegistry = field(default_factory=lambda: ComponentRegistry("component", "components"))
    tasks: TaskRegistry = field(default_factory=lambda: TaskRegistry("task", "tasks", named=True))
    evaluators: Registry = field(default_factory=lambda: Registry("evaluator", "evaluators", named=True))
    attacks: Registry = field(default_factory=lambda: Registry("attack", "attacks", named=True))
    exporters: Registry = field(default_factory=lambda: Registry("exporter", "exporters"))
    launchers: Registry = field(default_factory=lambda: Registry("launcher", "launchers"))

    def all(self) -> list[Names]:
        """Every registry, in the order in which `erasekit ls` shows them."""
        return [v for v in vars(self).values() if isinstance(v, Names)]

    def broken(self) -> list[PluginInfo]:
        """The plugins that failed."""
        return [p for p in self.found if p.status == "broken"]


_Importer = Callable[[], ModuleType]


def load(plugin_files: Sequence[str | Path] = (), *, modules: Sequence[str] = BUILT_IN) -> Registries:
    """Load the built-in plugins (`modules`), those of installed distributions (group `erasekit`), and single files.

    `ERASEKIT_DISABLED_PLUGINS` (names, comma-separated) blocks plugins; `ERASEKIT_TRACE_PLUGINS=1` writes hook calls to stderr.

    Raises:
        UsageError: a plugin file does not exist.
    """
    manager = pluggy.PluginManager("erasekit")
    manager.add_hookspecs(hookspecs)
    if os.environ.get("ERASEKIT_TRACE_PLUGINS") == "1":
        manager.trace.root.setwriter(sys.stderr.write)
        manager.enable_tracing()
    registries = Registries(manager)
    disabled = {n.strip() for n in os.environ.get("ERASEKIT_DISABLED_PLUGINS", "").split(",")}
    for name, source, importer in _candidates(modules, plugin_files):
        if name in disabled:
            registries.found.append(PluginInfo(name, source, "disabled"))
        else:
            registries.found.append(_add(registries, name, source, importer))
    return registries


@cache
def default() -> Registries:
    """What is installed, without plugin files."""
    return load()


def _candidates(modules: Sequence[str], plugin_files: Sequence[str | Path]) -> list[tuple[str, str, _Importer]]:
    """(name, source, importer) of every plugin, in the order in which they may take names."""
    found: list[tuple[str, str, _Importer]] = []
    for module in modules:
        found.append((module.rpartition(".")[2], "erasekit", _importer(module)))
    points = importlib.metadata.entry_points(group="erasekit")
    for point in sorted(points, key=lambda p: (p.dist is None or p.dist.name != "erasekit", p.name)):
        source = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        found.append((point.name, source, point.load))
    for path in map(Path, plugin_files):
        if not path.is_file():
            raise UsageError(f"No plugin file '{path}'. Give --plugin the path of a Python file.")
        found.append((path.stem, str(path), _file_importer(path)))
    return found


def _importer(module: str) -> _Importer:
    return lambda: importlib.import_module(module)


def _file_importer(path: Path) -> _Importer:
    """Import a file under its own name, so that its lazy targets ("my_method:Mine") find it again."""

    def load_file() -> ModuleType:
        if path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) != str(path.resolve()):
            raise ImportError(f"there is already a module called '{path.stem}'; rename the file")
        spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            raise
        return module

    return load_file


def _add(registries: Registries, name: str, source: str, importer: _Importer) -> PluginInfo:
    """Import one plugin and let it register; undo all of it if anything fails."""
    manager = registries.manager
    plugin: Any = None
    try:
        plugin = importer()
        manager.register(plugin, name=name)
        manager.check_pending()
        if not manager.get_hookcallers(plugin):
            raise UsageError("it has no hook; mark its functions with @erasekit.hookimpl")
        _collect(registries, plugin, name, source)
        return PluginInfo(name, source)
    except (Exception, SystemExit) as error:
        if plugin is not None and manager.is_registered(plugin):
            manager.unregister(plugin)
            for names in registries.all():
                names.remove(name)
        line, details = _line(error), traceback.format_exc()
        for names in registries.all():
            names.broken[name] = BrokenPlugin(f"Plugin '{name}' ({source}) is broken: {line}", details)
        return PluginInfo(name, source, "broken", line, details)


def _line(error: BaseException) -> str:
    """An error in one line, without a stop; what erasekit says itself needs no name of a class."""
    text = " ".join(str(error).split()).removesuffix(".")
    if unknown := re.match(r"unknown hook '(\w+)'", text):
        return f"there is no hook '{unknown[1]}'.{nearest(unknown[1], vars(hookspecs))}".removesuffix(".")
    return text if isinstance(error, ErasekitError) else f"{type(error).__name__}: {text}"


def _collect(registries: Registries, plugin: ModuleType, name: str, source: str) -> None:
    """Call the registration hooks of one plugin."""
    others = [p for p in registries.manager.get_plugins() if p is not plugin]
    for names in registries.all():
        hook = registries.manager.subset_hook_caller(f"register_{names.plural}", others)
        if names.plural == "components":
            hook(register=_register_component(names, name, source))
        else:
            hook(register=_register(names, name, source, Path(plugin.__file__ or "").parent))


def _register(names: Names, plugin: str, source: str, folder: Path) -> hookspecs.Register:
    def register(name: str, target: Any, *, aliases: Sequence[str] = (), summary: str = "", paper: str = "") -> None:
        if isinstance(target, str) and target.endswith(".toml"):
            target = str(folder / target)  # beside the plugin's module
        names.add(Entry(name, target, plugin, source, aliases=tuple(aliases), summary=summary, paper=paper))

    return register


def _register_component(names: Names, plugin: str, source: str) -> hookspecs.RegisterComponent:
    def register(slot: str, name: str, target: Any, *, summary: str = "", paper: str = "", version: int = 1) -> None:
        names.add(Entry(f"{slot}/{name}", target, plugin, source, summary=summary, paper=paper, version=version))

    return register


def add_commands(registries: Registries, app: typer.Typer) -> None:
    """Let plugins add commands to the command line; one that fails is marked broken."""
    manager = registries.manager
    for name, plugin in list(manager.list_name_plugin()):
        others = [p for p in manager.get_plugins() if p is not plugin]
        try:
            manager.subset_hook_caller("register_commands", others)(app=app)
        except Exception as error:
            index = next(i for i, p in enumerate(registries.found) if p.name == name)
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"
            broken = replace(registries.found[index], status="broken", error=line, details=traceback.format_exc())
            registries.found[index] = broken
