"""With `erasekit_example` installed (`nox -s third_party`): a foreign method runs through the same command."""

import json

from tests.conftest import THIRD_PARTY


def test_the_installed_method_is_listed_with_its_distribution(erasekit):
    listed = json.loads(erasekit("ls", "methods", "--json").stdout)["methods"]
    assert {m["name"]: m["plugin"] for m in listed}["rename"] == "example (erasekit-example 0.3.0)"


def test_the_installed_method_runs(erasekit, tiny_folder):
    world = ["--plugin", THIRD_PARTY / "tiny_world.py", "-b", "tiny", "-t", "words", "-s", f"backbone.path={tiny_folder}"]
    done = erasekit("run", "--method", "rename", "-c", "cat", "-s", "method.neutral=a thing", "--json", *world)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "rename"
