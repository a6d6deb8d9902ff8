import pytest

from erasekit.errors import UsageError
from erasekit.registration.registry import BrokenPlugin, ComponentRegistry, DuplicateName, Entry, Registry, TaskRegistry


def entry(name, target="json:loads", plugin="one", source="one 1.0", **more):
    return Entry(name, target, plugin, source, **more)


@pytest.fixture
def methods():
    names = Registry("method", "methods")
    names.add(entry("trace", aliases=("trace-2025",), summary="s", paper="p"))
    names.add(entry("uce", dict, plugin="two", source="two 2.0"))
    return names


def test_a_lazy_target_is_imported_when_it_is_asked_for(methods):
    import json

    assert methods.get("trace") is json.loads
    assert methods.get("trace-2025") is json.loads
    assert methods.get("uce") is dict
    assert [e.name for e in methods.entries()] == ["trace", "uce"]


@pytest.mark.parametrize("name", ["trace", "trace-2025"])
def test_a_taken_name_names_both_owners_and_adds_nothing(methods, name):
    with pytest.raises(DuplicateName) as raised:
        methods.add(entry("new", aliases=(name,), plugin="three", source="three.py"))
    assert "'one' (one 1.0)" in str(raised.value)
    assert "'three' (three.py)" in str(raised.value)
    assert [e.name for e in methods.entries()] == ["trace", "uce"]


def test_a_plugin_takes_its_names_and_aliases_along(methods):
    methods.remove("one")
    assert [e.name for e in methods.entries()] == ["uce"]
    with pytest.raises(UsageError):
        methods.get("trace-2025")


def test_an_unknown_name_is_answered_with_the_nearest(methods):
    with pytest.raises(UsageError, match=r"Unknown method 'trcae'\. Did you mean 'trace'\? See 'erasekit ls methods'\."):
        methods.get("trcae")


@pytest.mark.parametrize("target", ["no_such_module:x", "json:no_such_attribute"])
def test_a_target_that_cannot_be_loaded_shows_why(methods, target):
    methods.add(entry("broken", target, plugin="bad", source="bad 0.1"))
    with pytest.raises(BrokenPlugin, match=r"'broken' of bad 0\.1 cannot be loaded") as raised:
        methods.get("broken")
    assert "Traceback" in raised.value.details
    assert raised.value.exit_code == 3


class Mine:
    name = "mine"


class Nameless:
    pass


@pytest.mark.parametrize(
    ("name", "target", "own"),
    [("yours", "tests.test_registry:Mine", "mine"), ("nameless", "tests.test_registry:Nameless", "None")],
)
def test_a_class_has_the_name_that_it_is_registered_under(name, target, own):
    names = Registry("method", "methods", named=True)
    names.add(entry("mine", "tests.test_registry:Mine"))
    assert names.get("mine").name == "mine"
    names.add(entry(name, target))
    says = (
        rf"The method '{name}' of one 1\.0 is '{target.partition(':')[2]}', which has the name '{own}'\. Give both one name\."
    )
    with pytest.raises(BrokenPlugin, match=says):
        names.get(name)
    with pytest.raises(BrokenPlugin, match=says):  # an object shows it at once
        Registry("method", "methods", named=True).add(entry(name, {"mine": Mine, "None": Nameless}[own]))


def test_a_task_has_its_domain_and_name():
    names = TaskRegistry("task", "tasks", named=True)
    names.add(entry("mini/words", "erasekit.testing.world:Words"))
    assert names.get("words", "mini").name == "words"
    names.add(entry("natural/words", "erasekit.testing.world:Words"))
    with pytest.raises(BrokenPlugin, match=r"The task 'natural/words' .* has the name 'mini/words'"):
        names.get("words", "natural")


def test_components_are_chosen_by_slot():
    components = ComponentRegistry("component", "components")
    components.add(entry("refine/none", int))
    components.add(entry("refine/whitened", float))
    components.add(entry("window/full", str))
    assert components.choices("refine") == ["none", "whitened"]
    assert components.get("refine", "whitened") is float
    with pytest.raises(UsageError, match=r"Unknown choice for 'refine' 'whitend'\. Did you mean 'whitened'\?"):
        components.get("refine", "whitend")
    with pytest.raises(UsageError, match="Unknown choice for 'window' 'none'"):
        components.get("window", "none")


def test_a_task_is_that_of_the_domain():
    tasks = TaskRegistry("task", "tasks")
    tasks.add(entry("mini/objects", int))
    tasks.add(entry("natural/objects", float))
    tasks.add(entry("natural/i2p", str))
    assert tasks.get("objects", "mini") is int
    assert tasks.get("objects", "natural") is float
    assert tasks.get("mini/objects", "mini") is int
    with pytest.raises(UsageError, match=r"'natural/i2p' is not of the backbone's domain 'mini', which has objects\."):
        tasks.get("i2p", "mini")
    with pytest.raises(UsageError, match=r"'natural/objects' is not of the backbone's domain 'mini', which has objects\."):
        tasks.get("natural/objects", "mini")
    with pytest.raises(UsageError, match=r"Unknown mini task 'objcts'\. Did you mean 'objects'\?"):
        tasks.get("objcts", "mini")
