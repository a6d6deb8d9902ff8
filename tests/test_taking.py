"""An erasure is computed once for all runs that want the same one: counted where methods compute."""

import json
import shutil
import threading
import time

import pytest

from erasekit.atomic import lock_of
from erasekit.cli import main
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.cost import cost
from erasekit.runs.forecast import forecast
from erasekit.runs.offers import offered
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from tests.conftest import THIRD_PARTY

ATTACK = """
from erasekit import hookimpl
from erasekit_attacks.seeds import Seeds

class Again(Seeds):
    name = "again"

@hookimpl
def register_attacks(register):
    register("again", Again)
"""


STAGE = """
import os

from erasekit import hookimpl


def same(ctx, deltas, config):
    return dict(deltas)


@hookimpl
def register_components(register):
    register("robustify", "same", same, version=int(os.environ["STAGE_VERSION"]))
"""


@pytest.fixture
def registries(world):
    return plugins.load([world, THIRD_PARTY / "single_file_method.py"])


@pytest.fixture
def configured(tiny_folder):
    def config(*overrides, **flags):
        names = {"method": "direction", "backbone": "tiny", "task": "words", "concepts": ("cat",), "limit": 1}
        return build({**names, **flags}, overrides=[f"backbone.path={tiny_folder}", "backbone.device=cpu", *overrides])

    return config


@pytest.fixture
def computed(registries, monkeypatch):
    """The names of methods, each time that one computes."""
    calls = []
    for name in ("direction", "pull", "uce"):
        method = registries.methods.get(name)

        def counted(self, ctx, name=name, erase=method.erase):
            calls.append(name)
            return erase(self, ctx)

        monkeypatch.setattr(method, "erase", counted)
    return calls


@pytest.fixture
def do(registries, tmp_path):
    """Do a run: its result, its directory, and the lines that it said."""

    def done(config, out=tmp_path, **how):
        heard = []
        result = run(config, out=out, registries=registries, listener=heard.append, **how)
        said = [event.line for event in heard if type(event).__name__ == "Noted"]
        return result, path_of(out, resolve(config, registries)), said

    return done


def record_of(path):
    return json.loads((path / "computed.json").read_text())


def write_record(path, **changes):
    (path / "computed.json").write_text(json.dumps(record_of(path) | changes))


def test_the_names_of_runs_are_what_they_always_were(registries):
    """Results lie on disk under these names."""

    def hash_of(**flags):
        return resolve(build({"method": "pull", "backbone": "tiny", "task": "words", **flags}), registries).hash

    assert hash_of(concepts=("cat",)) == "39951750"
    assert hash_of(concepts=("cat",), limit=3, seed=1) == "a0a4a8c8"
    assert hash_of() == "3df0fdb2"
    assert hash_of(concepts=("cat", "dog"), files="float16", attacks=("seeds",)) == "04361830"


def test_erasures_are_the_same_where_all_that_decides_them_is(registries, tiny_folder):
    def plan(*overrides, **flags):
        names = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
        return resolve(build({**names, **flags}, overrides=overrides), registries)

    same = [plan(), plan(limit=1), plan(attacks=("seeds",)), plan(attacks=("seeds",), keep_texts=True)]
    assert len({p.erasing for p in same}) == 1
    assert len({p.hash for p in same}) == 4
    different = [
        plan("method.steps=3"),
        plan("protocol.steps=3"),
        plan("backbone.dtype=bfloat16"),
        plan(seed=1),
        plan(files="float16"),
        plan(concepts=("dog",)),
        plan(concepts=("cat", "dog")),
        plan(concepts=("cat:kitten",)),
        plan(method="direction"),
        plan(backbone="tiny-flux"),
    ]
    assert len({p.erasing for p in (same[0], *different)}) == 11
    assert plan(method="uce").erasing == plan(method="uce", seed=1).erasing
    assert plan(method="uce").hash != plan(method="uce", seed=1).hash


def test_another_version_of_a_method_or_of_a_task_is_another_erasure(registries, configured, monkeypatch):
    plan = resolve(configured(), registries)
    for what in (plan.method, type(plan.task)):
        before = plan.erasing
        monkeypatch.setattr(what, "version", what.version + 1)
        assert plan.erasing != before


def test_another_version_of_a_component_is_another_erasure_of_those_who_use_it(world, configured, tmp_path, monkeypatch):
    (tmp_path / "stage.py").write_text(STAGE)

    def erasing(version, *overrides):
        monkeypatch.setenv("STAGE_VERSION", str(version))
        return resolve(configured(*overrides, method="uce"), plugins.load([world, tmp_path / "stage.py"])).erasing

    assert erasing(1) == erasing(2)
    assert erasing(1, "method.robustify=same") != erasing(2, "method.robustify=same")


def test_a_plugin_that_measures_is_no_part_of_the_erasure(world, configured, tmp_path):
    (tmp_path / "again.py").write_text(ATTACK)
    plain, more = plugins.load([world]), plugins.load([world, tmp_path / "again.py"])
    one, other = resolve(configured(method="pull"), plain), resolve(configured(method="pull", attacks=("again",)), more)
    assert set(other.sources) > set(one.sources)
    assert other.erasing == one.erasing


def test_a_run_that_is_measured_in_another_way_computes_no_erasure(do, configured, computed):
    first, path, said = do(configured())
    assert said == []
    assert record_of(path)["run"] == path.name
    write_record(path, erase_s=1234.5, peak_memory_mb=10.0**9)
    again, other, said = do(configured(limit=None))
    assert computed == ["direction"]
    assert other != path
    assert said == [
        f"Run {path.name} has computed this erasure, in 1234.5 s. It is taken from run {path.name}; --force computes it anew."
    ]
    assert said[0] in (other / "log.jsonl").read_text()
    assert again.erasure_sha256 == first.erasure_sha256
    assert again.counts["images"] > first.counts["images"]
    for file in ("erasure.json", "cat.safetensors", "all.safetensors"):
        assert (other / "erasure" / file).read_bytes() == (path / "erasure" / file).read_bytes()
    assert record_of(other) == record_of(path)
    # What it cost is what computing it took.
    assert again.timings_s["erase"] == 1234.5
    assert again.peak_memory_mb == 10.0**9
    assert first.timings_s["erase"] < 100
    shutil.rmtree(path)  # the third takes it from the second, and says who has computed it
    _, third, said = do(configured(attacks=("seeds",)))
    assert computed == ["direction"]
    assert f"Run {path.name} has computed" in said[0]
    assert f"from run {other.name}" in said[0]
    assert record_of(third)["run"] == path.name


def test_the_numbers_are_those_of_a_run_alone(do, configured, tmp_path):
    do(configured())
    taken, path, _ = do(configured(limit=None))
    alone, other, _ = do(configured(limit=None), out=tmp_path / "alone")
    assert taken.metrics == alone.metrics
    for image in (path / "images" / "erased").glob("*.png"):
        assert image.read_bytes() == (other / "images" / "erased" / image.name).read_bytes()


def test_force_computes_anew_and_the_newest_is_taken(do, configured, computed):
    do(configured())
    _, path, said = do(configured(limit=None), force=True)
    assert computed == ["direction"] * 2
    assert said == []
    assert record_of(path)["run"] == path.name
    _, _, said = do(configured(attacks=("seeds",)))
    assert computed == ["direction"] * 2
    assert f"from run {path.name}" in said[0]


def flipped(path):
    file = path / "erasure" / "all.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "the run is gone": (shutil.rmtree, False),
    "the erasure is gone": (lambda path: shutil.rmtree(path / "erasure"), False),
    "the record is gone": (lambda path: (path / "computed.json").unlink(), False),
    "the record is cut": (lambda path: (path / "computed.json").write_text('{"schema_version": 1, "era'), False),
    "the record leads elsewhere": (lambda path: write_record(path, run="../../.."), False),
    "a file of the erasure is gone": (lambda path: (path / "erasure" / "cat.safetensors").unlink(), True),
    "a bit is flipped": (flipped, True),
    "it is another erasure": (lambda path: write_record(path, erasure_sha256="0" * 64), True),
    "its manifest is cut": (lambda path: (path / "erasure" / "erasure.json").write_text("{"), True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_computed_again(damage, do, configured, computed):
    change, told = DAMAGES[damage]
    first, path, _ = do(configured())
    change(path)
    again, other, said = do(configured(limit=2))
    assert computed == ["direction"] * 2
    assert again.erasure_sha256 == first.erasure_sha256
    assert record_of(other)["run"] == other.name
    line = f"Run {path.name} has the same erasure, but damaged or of other weights. It is not taken."
    assert said == ([line] if told else [])


def test_an_erasure_of_other_weights_in_the_same_folder_is_not_taken(do, configured, computed, tmp_path):
    from erasekit.testing import tiny

    base = tiny.save_pipeline(tmp_path / "base")
    first, _, _ = do(configured(f"backbone.path={base}"))
    shutil.rmtree(base)
    tiny.save_pipeline(base, seed=1)
    again, _, said = do(configured(f"backbone.path={base}", limit=2))
    assert computed == ["direction"] * 2
    assert again.erasure_sha256 != first.erasure_sha256
    assert "of other weights" in said[0]


def test_another_seed_computes_unless_the_method_has_no_use_for_it(do, configured, computed):
    do(configured("method.steps=1", method="pull"))
    do(configured("method.steps=1", method="pull", seed=1))
    assert computed == ["pull", "pull"]
    first, path, _ = do(configured(method="uce"))
    second, other, _ = do(configured(method="uce", seed=1))
    assert computed == ["pull", "pull", "uce"]
    assert (first.seed, second.seed) == (0, 1)
    assert first.erasure_sha256 == second.erasure_sha256
    assert path != other


def test_the_report_says_where_the_training_was(do, configured, computed):
    _, path, _ = do(configured("method.steps=2", method="pull"))
    _, other, _ = do(configured("method.steps=2", method="pull", limit=2))
    assert computed == ["pull"]
    line = f"The erasure was trained by run {path.name} and copied."
    assert line in (other / "report.html").read_text()
    assert line not in (path / "report.html").read_text()
    _, closed, _ = do(configured(method="uce"))
    _, other, _ = do(configured(method="uce", limit=2))
    page = (other / "report.html").read_text()
    assert f"run {closed.name}, whose seconds of erasing these are" in page
    assert "was trained by run" not in page


def test_a_run_that_was_stopped_after_it_took_an_erasure_still_knows_what_it_cost(
    do, configured, computed, registries, tmp_path
):
    _, path, _ = do(configured())
    write_record(path, erase_s=1234.5)

    def stop(event):
        if getattr(event, "stage", "") == "sample":
            raise KeyboardInterrupt

    config = configured(limit=2)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path, registries=registries, listener=stop)
    shutil.rmtree(path)
    result, _, _ = do(config)
    assert computed == ["direction"]
    assert result.timings_s["erase"] == 1234.5


def test_one_who_comes_while_another_computes_waits_for_it(do, configured, computed, registries, tmp_path):
    plan = resolve(configured(), registries)
    lock = lock_of(path_of(tmp_path, plan).with_name(f"erasing-{plan.erasing}"))
    lock.acquire()
    found, waiting = [], threading.Thread(target=lambda: found.append(do(configured())))
    waiting.start()
    log = path_of(tmp_path, plan) / "log.jsonl"
    until = time.monotonic() + 60
    while not (log.is_file() and "waits for it" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert computed == []
    lock.release()
    waiting.join()
    ((_, _, said),) = found
    assert said == ["Another run is computing the same erasure. This one waits for it."]
    assert computed == ["direction"]


def test_an_erasure_that_will_be_taken_costs_nothing(do, configured, registries, tmp_path):
    plan = resolve(configured("method.steps=4", method="pull", limit=2), registries)
    before = cost(plan, tmp_path)
    _, path, _ = do(configured("method.steps=4", method="pull"))
    assert [run for run, _ in offered(tmp_path, plan)] == [path]
    after, anew = cost(plan, tmp_path), cost(plan, tmp_path, anew=True)
    assert (before.taken, after.taken, anew.taken) == (0, 1, 0)
    assert after.passes < before.passes == anew.passes
    assert after.hours < anew.hours
    assert forecast(plan, tmp_path, 1).stage_s["erase"] == 0
    assert forecast(plan, tmp_path, 1, anew=True).stage_s["erase"] > 0
    every = resolve(configured("method.steps=4", method="pull", concepts=(), limit=2), registries)
    assert cost(every, tmp_path).taken == 1


def test_a_dry_run_says_that_it_will_be_taken(do, configured, world, tiny_folder, tmp_path, capsys):
    names = ["-m", "pull", "-b", "tiny", "-t", "words", "-c", "cat", "--plugin", str(world), "--out", str(tmp_path)]
    names += ["-s", f"backbone.path={tiny_folder}", "-s", "backbone.device=cpu", "-s", "method.steps=1", "--limit", "2"]

    def dry(*more):
        assert main(["run", "--dry-run", "--json", *names, *more]) == 0
        return json.loads(capsys.readouterr().out)

    assert dry()["stages"]["erase"].startswith("1 training steps")
    do(configured("method.steps=1", method="pull"))
    told = dry()
    assert told["stages"]["erase"].startswith("nothing: an earlier run has the erasure")
    assert told["cost"]["taken"] == 1
    assert dry("--force")["stages"]["erase"].startswith("1 training steps")
    del names[names.index("-c") : names.index("-c") + 2]
    assert dry()["stages"]["erase"].endswith("; 1 of 2 erasures are taken from earlier runs, unless --force is given")
