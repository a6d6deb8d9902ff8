import importlib.metadata
import inspect
import sys
import textwrap
from typing import ClassVar

import pytest

from erasekit.errors import UsageError
from erasekit.events import Dispatcher, StageStarted
from erasekit.registration import hookspecs, plugins
from erasekit.registration.hookspecs import hookimpl
from erasekit.registration.registry import BrokenPlugin
from tests.conftest import THIRD_PARTY


@pytest.fixture
def write(tmp_path):
    """Write a plugin file; what it left in sys.modules is gone afterwards."""
    before = set(sys.modules)

    def written(text, name="my_plugin"):
        path = tmp_path / f"{name}.py"
        path.write_text("from erasekit import hookimpl\n" + textwrap.dedent(text))
        return path

    yield written
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def info(registries, name):
    return next(p for p in registries.found if p.name == name)


def test_built_in_and_first_party_plugins_are_found_and_whole():
    registries = plugins.load()
    assert [p.name for p in registries.found][:1] == ["builtin"]
    assert {p.name for p in registries.found} >= {"builtin", "mini", "trace"}
    assert registries.broken() == []
    assert registries.methods.entry("trace").source == f"erasekit {importlib.metadata.version('erasekit')}"


def test_a_plugin_file_registers_with_its_own_lazy_target(write):
    path = write("""
        class Mine:
            name = "mine"
        @hookimpl
        def register_methods(register):
            register("mine", "my_plugin:Mine", aliases=("m",), summary="s", paper="p")
        @hookimpl
        def register_components(register):
            register("refine", "my-refiner", "my_plugin:Mine")
    """)
    registries = plugins.load([path])
    assert registries.methods.get("m").__name__ == "Mine"
    assert registries.methods.entry("mine").source == str(path)
    assert registries.components.get("refine", "my-refiner") is registries.methods.get("mine")


def test_the_third_party_file_registers():
    registries = plugins.load([THIRD_PARTY / "single_file_method.py"])
    assert registries.broken() == []
    assert registries.methods.get("direction").name == "direction"


def test_a_plugin_that_raises_is_set_aside_and_the_others_go_on():
    registries = plugins.load([THIRD_PARTY / "raises_on_import.py"])
    [broken] = registries.broken()
    assert broken.name == "raises_on_import"
    assert broken.error == "RuntimeError: this plugin is broken on purpose"
    assert "raises_on_import.py" in broken.details
    assert registries.methods.entry("trace")
    with pytest.raises(BrokenPlugin, match="broken on purpose"):
        registries.methods.get("raises_on_import")


def test_a_plugin_that_fails_half_way_leaves_nothing_behind(write):
    path = write("""
        @hookimpl
        def register_methods(register):
            register("first", type("First", (), {"name": "first"}))
            raise SystemExit("not today")
    """)
    registries = plugins.load([path])
    assert info(registries, "my_plugin").error == "SystemExit: not today"
    with pytest.raises(BrokenPlugin):
        registries.methods.get("my_plugin")
    with pytest.raises(UsageError, match="Unknown method 'first'"):
        registries.methods.get("first")
    assert registries.manager.get_plugin("my_plugin") is None


def test_a_duplicate_name_breaks_the_later_plugin_and_names_both(write):
    path = write("""
        @hookimpl
        def register_methods(register):
            register("trace", int)
    """)
    registries = plugins.load([path])
    assert registries.methods.entry("trace").plugin == "trace"
    error = info(registries, "my_plugin").error
    assert "'trace' (erasekit" in error
    assert f"'my_plugin' ({path})" in error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("@hookimpl\ndef register_metods(register): ...", "register_metods"),
        ("@hookimpl\ndef register_methods(registre): ...", "registre"),
        ("def register_methods(register): ...", "no hook"),
        ("def register_methods(register: ...", "SyntaxError"),
    ],
)
def test_a_misspelt_hook_is_an_error(write, text, says):
    registries = plugins.load([write(text)])
    assert says in info(registries, "my_plugin").error
    assert info(registries, "my_plugin").status == "broken"


def test_a_file_may_not_hide_a_module(write):
    registries = plugins.load([write("", name="json")])
    assert "there is already a module called 'json'" in info(registries, "json").error


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"No plugin file 'nowhere\.py'"):
        plugins.load(["nowhere.py"])


def test_plugins_can_be_blocked(monkeypatch):
    monkeypatch.setenv("ERASEKIT_DISABLED_PLUGINS", "trace, other")
    registries = plugins.load()
    assert info(registries, "trace").status == "disabled"
    with pytest.raises(UsageError, match="Unknown method 'trace'"):
        registries.methods.get("trace")


def test_hook_calls_can_be_traced(monkeypatch, capsys):
    monkeypatch.setenv("ERASEKIT_TRACE_PLUGINS", "1")
    plugins.load()
    assert "register_methods" in capsys.readouterr().err


def test_a_failing_event_hook_costs_nothing(write, caplog):
    path = write("""
        seen = []
        @hookimpl
        def on_event(event, run):
            seen.append((type(event).__name__, run))
            raise OSError("tracker is down")
    """)
    registries = plugins.load([path])
    heard = []

    class Log:
        def log(self, event):
            heard.append(event)

    event = StageStarted("erase")
    run = Log()
    Dispatcher(registries.manager, run, heard.append)(event)
    assert heard == [event, event]
    assert sys.modules["my_plugin"].seen == [("StageStarted", run)]
    assert "tracker is down" in caplog.text


def test_a_failing_event_hook_is_named_once_and_the_others_hear_all(write, caplog):
    class Quiet:
        seen: ClassVar[list[str]] = []

        @hookimpl(trylast=True)
        def on_event(self, event):
            self.seen.append(type(event).__name__)

    path = write("""
        @hookimpl
        def on_event(event, run):
            raise OSError("tracker is down")
    """)
    registries = plugins.load([path])
    registries.manager.register(Quiet(), "quiet")
    tell = Dispatcher(registries.manager, type("Log", (), {"log": lambda self, event: None})(), None)
    for stage in ("load", "erase", "sample"):
        tell(StageStarted(stage))
    assert Quiet.seen == ["StageStarted"] * 3
    (said,) = (record.getMessage() for record in caplog.records if "'my_plugin'" in record.getMessage())
    assert "failed in on_event(StageStarted)" in said


def test_a_plugin_that_breaks_on_commands_is_marked(write):
    path = write("""
        @hookimpl
        def register_commands(app):
            app.no_such_thing()
    """)
    import typer

    registries = plugins.load([path])
    plugins.add_commands(registries, typer.Typer())
    assert "no_such_thing" in info(registries, "my_plugin").error


def test_every_hook_is_typed_and_documented():
    hooks = {n: f for n, f in inspect.getmembers(hookspecs, inspect.isfunction) if f.__module__ == hookspecs.__name__}
    names = {n.plural for n in plugins.default().all()}
    assert set(hooks) == {f"register_{n}" for n in names} | {"register_commands", "on_event"}
    for hook in hooks.values():
        assert hook.__doc__
        assert all(p.annotation is not inspect.Parameter.empty for p in inspect.signature(hook).parameters.values())
