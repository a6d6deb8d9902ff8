"""Sweeps in the tiny world: what was done is counted by the model and the method themselves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from erasekit.cli.sweep import command
from erasekit.errors import ErasekitError, UsageError
from erasekit.evaluation.results import Metric, RunResult, read_result, write_result
from erasekit.registration import plugins
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import open_run, path_of, read_status
from erasekit.runs.runner import run
from erasekit.sweeps.cells import Cell, cells_of, give_another_chance, run_config, seen, write_cells
from erasekit.sweeps.suite import Suite, adjusted, of_method, parse_row, read_suite, rows_of
from erasekit.sweeps.sweep import How, check_gpus, sweep
from erasekit.sweeps.table import by_attack, by_row, tables_of
from erasekit.sweeps.worker import work
from tests.sweeping import BOTH, DRAWN, FILES, IMAGES, counted, grid_of, lines_of, numbers

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def registries():
    return plugins.load(FILES)


@pytest.fixture
def suite(tiny_folder):
    return lambda **changes: grid_of(tiny_folder, **changes)


def toml_of(suite):
    """A suite as a file; what `suite` above gives needs no more."""
    where, method = suite.run["options"]["backbone"], suite.on["counted"]["options"]["method"]
    lists = {name: list(getattr(suite, name)) for name in ("methods", "backbones", "tasks", "seeds")}
    lines = [f"{name} = {json.dumps(values)}" for name, values in lists.items()]
    lines += ["[run.options.backbone]", *(f"{k} = {json.dumps(v)}" for k, v in where.items())]
    return "\n".join([*lines, "[on.counted.options.method]", *(f"{k} = {json.dumps(v)}" for k, v in method.items())])


@pytest.fixture
def counts(tmp_path, monkeypatch):
    """What was counted so far: erasures, images, loads."""
    file = tmp_path / "counts.jsonl"
    monkeypatch.setenv("COUNTS", str(file))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]))

    def read():
        lines = lines_of(file)
        file.unlink(missing_ok=True)
        return counted(lines)

    return read


@pytest.fixture(scope="module")
def alone(registries, tiny_folder, tmp_path_factory):
    """The numbers of an undisturbed worker in one process."""
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("alone")
        patch.setenv("COUNTS", str(out / "counts"))
        cells = cells_of(grid_of(tiny_folder), registries, out)
        assert work(write_cells(cells, out, "alone"), out, plugins=FILES) == 4
        return {cell.path: read_result(out / cell.path / "results.json").metrics for cell in cells}


@pytest.mark.slow
def test_a_killed_driver_and_a_killed_worker_cost_nothing_that_was_finished(
    suite, registries, counts, tmp_path, alone, monkeypatch
):
    out, file = tmp_path / "runs", tmp_path / "suite.toml"
    slow = suite(on={"counted": {"options": {"method": {"pause": 0.2}}}})
    expected = {cell.path for cell in cells_of(slow, registries, out)}
    file.write_text(toml_of(slow))
    command = [sys.executable, "-m", "erasekit", "sweep", file, "--out", out]
    command += [word for plugin in FILES for word in ("--plugin", plugin)]
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        until = time.monotonic() + 240
        while not list(out.glob("*/words/counted/*/results.json")) and time.monotonic() < until:
            time.sleep(0.02)
        driver.kill()
    before, killed = len(lines_of(tmp_path / "counts.jsonl")), []

    def kill_once(cells):
        at_work = [how.stage for _, how in cells if how.state == "begun"]
        pids = [line["loaded"] for line in lines_of(tmp_path / "counts.jsonl")[before:] if "loaded" in line]
        if not killed and pids and any(stage.startswith("steps") for stage in at_work):
            os.kill(pids[-1], signal.SIGKILL)
            killed.append(pids[-1])

    monkeypatch.setattr("erasekit.sweeps.sweep.POLL_S", 0.05)
    swept = sweep(slow, registries, name="suite", out=out, how=How(plugins=FILES), watch=kill_once)
    assert killed
    assert not swept.failed
    assert {cell.path for cell, _ in swept.cells} == expected
    assert list(numbers(swept).values()) == list(alone.values())
    erased, images, loads = counts()
    assert (erased, images) == (BOTH, IMAGES)
    assert loads == 3
    assert swept.folder == next((out / "sweeps").iterdir())  # the same cells, the same folder


def test_many_workers_at_once_compute_a_cell_once(suite, registries, counts, tmp_path, alone):
    """Twenty at one folder, as if a config was started twenty times; forked, so that torch is loaded once."""
    out = tmp_path / "runs"
    folder = write_cells(cells_of(suite(), registries, out), out, "many")

    def one(number):
        try:
            work(folder, out, plugins=FILES, number=number, of=20)
        finally:
            os._exit(0)

    workers = [os.fork() or one(number) for number in range(20)]
    for worker in workers:
        os.waitpid(worker, 0)
    swept = sweep(suite(), registries, name="many", out=out, how=How(plugins=FILES))
    assert numbers(swept) == alone
    erased, images, _ = counts()
    assert (erased, images) == (BOTH, IMAGES)


def test_one_bad_cell_stops_no_other_and_is_tried_again_when_asked(suite, registries, counts, tmp_path):
    out = tmp_path / "runs"
    rows = [
        {"name": "good", "method": "counted"},
        {"name": "not a number", "method": "counted", "options": {"method": {"nan_at": 8}}},
        {"name": "no such setting", "method": "counted", "options": {"method": {"stepps": 8}}},
        {"name": "lost", "method": "counted", "options": {"method": {"steps": 3}}},
    ]
    grid = suite(methods=(), rows=rows, seeds=(0,), concepts={"words": ("cat",)})
    cells = cells_of(grid, registries, out)
    lost = resolve(run_config(cells[3]), registries)
    for _ in range(3):  # three processes that opened the run and never ended it
        with open_run(out, lost):
            pass
    folder = write_cells(cells, out, "bad")
    assert work(folder, out, plugins=FILES) == 3
    states = {cell.row: seen(cell, out) for cell in cells}
    assert [how.state for how in states.values()] == ["finished", "failed", "failed", "failed"]
    assert "stopped at step 8" in states["not a number"].error
    assert "'method.stepps'" in states["no such setting"].error
    assert "lost 3 times" in states["lost"].error
    assert counts()[0] == [("cat", 0)]
    assert work(folder, out, plugins=FILES) == 0
    give_another_chance(cells, out)
    assert work(folder, out, plugins=FILES) == 2
    assert [seen(cell, out).state for cell in cells] == ["finished", "failed", "failed", "finished"]
    assert counts()[:2] == ([("cat", 0)], DRAWN)  # its base's images are the good cell's


def test_what_nobody_foresaw_is_one_cells_and_leaves_its_traceback(suite, registries, counts, tmp_path):
    out = tmp_path / "runs"
    cells = cells_of(suite(seeds=(0,)), registries, out)
    (out / cells[0].path).mkdir(parents=True)
    (out / cells[0].path / "log.jsonl").mkdir()
    assert work(write_cells(cells, out, "odd"), out, plugins=FILES) == 2
    assert [seen(cell, out).state for cell in cells] == ["failed", "finished"]
    assert "IsADirectoryError" in (out / cells[0].path / "traceback.txt").read_text()


def test_a_worker_that_is_asked_to_stop_does_not_count_as_lost(suite, registries, counts, tmp_path, monkeypatch):
    out = tmp_path / "runs"
    config = run_config(cells_of(suite(seeds=(0,)), registries, out)[0])

    def stop(event):
        if type(event).__name__ == "StepEnd":
            raise KeyboardInterrupt

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(config, out=out, registries=registries, listener=stop)
    assert read_status(path_of(out, resolve(config, registries)))["starts"] == 0


def test_the_suite_says_what_is_wrong_with_it(suite, registries, tmp_path):
    wrong = {
        "Unknown method 'conted'. Did you mean 'counted'?": {"methods": ("conted",)},
        "Unknown backbone 'sd15-mine'": {"backbones": ("sd15-mine",)},
        "Unknown mini task 'wods'": {"tasks": ("wods",)},
        "'on.wrds' is no backbone, task or method": {"on": {"wrds": {"limit": 3}}},
        "'concepts.wrds' is no task": {"concepts": {"wrds": ("cat",)}},
        "Two rows are called 'counted'": {"rows": [{"method": "counted"}]},
        "has no rows": {"methods": ()},
        "Unknown concept 'ct'": {"concepts": {"words": ("ct",)}},
    }
    for says, changes in wrong.items():
        with pytest.raises(UsageError, match=re.escape(says)):
            cells_of(suite(**changes), registries, tmp_path)
    file = tmp_path / "suite.toml"
    for text, says in (("methods = 3", "Setting 'methods'"), ("methds = []", "methds"), ("=", "is not TOML")):
        file.write_text(text)
        with pytest.raises(UsageError, match=says):
            read_suite(file)


def test_settings_go_from_the_suite_over_the_task_to_the_row(suite, registries, tmp_path):
    grid = suite(
        seeds=(0,),
        ablations=("counted",),
        rows=[{"name": "long", "method": "counted", "options": {"method": {"steps": 9}}}],
        concepts={"words": ("cat", ("cat", "dog"))},
        on={"words": {"limit": 1}, "counted": {"options": {"method": {"rank": 1, "steps": 4}}}},
    )
    rows = [row.title for row in rows_of(grid, registries)]
    assert rows == ["counted", "counted in two steps", "counted nothing", "long"]
    cells = cells_of(grid, registries, tmp_path)
    assert [cell.row for cell in cells] == rows * 2
    assert [cell.config["concepts"] for cell in cells] == [("cat",)] * 4 + [("cat", "dog")] * 4
    plans = [resolve(run_config(cell), registries) for cell in cells]
    assert [plan.method_config.steps for plan in plans] == [4, 2, 0, 9] * 2
    assert {plan.method_config.rank for plan in plans} == {1}
    assert {plan.config.limit for plan in plans} == {1}
    over = adjusted(grid, limit=2, options={"method": {"steps": 5, "lr": 0.5}})
    plans = [resolve(run_config(cell), registries) for cell in cells_of(over, registries, tmp_path)]
    assert [plan.method_config.steps for plan in plans] == [5, 2, 0, 9] * 2
    assert {(plan.config.limit, plan.method_config.lr) for plan in plans} == {(2, 0.5)}
    over = adjusted(grid, options={"on": {"words": {"protocol": {"steps": 3}}, "counted": {"method": {"rank": 2}}}})
    plans = [resolve(run_config(cell), registries) for cell in cells_of(over, registries, tmp_path)]
    assert {(plan.protocol.steps, plan.method_config.rank, plan.config.limit) for plan in plans} == {(3, 2, 1)}
    with pytest.raises(UsageError, match=r"on\.NAME\.KEY=VALUE"):
        adjusted(grid, options={"on": {"words": 3}})
    with pytest.raises(UsageError, match=r"'on\.wrds' is no"):
        cells_of(adjusted(grid, options={"on": {"wrds": {"protocol": {"steps": 3}}}}), registries, tmp_path)


def test_ablations_are_rows_and_a_users_own_beside_them(registries):
    grid = of_method("counted", registries, rows=["quick: method.steps=1 'method.lr=0.1'"], seeds=range(3))
    assert [row.title for row in rows_of(grid, registries)] == ["counted", "counted in two steps", "counted nothing", "quick"]
    assert grid.seeds == (0, 1, 2)
    assert grid.rows[0].settings["options"] == {"method": {"steps": 1, "lr": 0.1}}
    for text in ("quick", "quick:", ": method.steps=1", "quick: steps=1", "quick: 'method.steps=1"):
        with pytest.raises(UsageError, match="Cannot read the"):
            parse_row(text, "counted")
    with pytest.raises(UsageError, match="declares no ablations"):
        of_method("pull", registries)


def test_a_worker_that_cannot_work_at_all_is_one_line(suite, registries, counts, tmp_path):
    with pytest.raises(ErasekitError, match=r"Worker 0 cannot work: .*nowhere\.py.*worker-0\.log"):
        sweep(suite(), registries, name="no", out=tmp_path / "runs", how=How(plugins=(tmp_path / "nowhere.py",)))


def test_cells_on_other_machines_say_for_which_gpu_they_are(suite, registries, tmp_path):
    grid = Suite(methods=("uce",), backbones=("sd15",), tasks=("free",), concepts={"free": ("a dog",)})
    cells = cells_of(grid, registries, tmp_path)
    with pytest.raises(UsageError, match="Say for which GPU"):
        check_gpus(cells, registries)
    check_gpus(cells_of(adjusted(grid, options={"backbone": {"vram": "80"}}), registries, tmp_path), registries)


def test_the_command_ends_with_a_table_and_a_page_and_names_what_failed(suite, counts, tmp_path, capsys):
    file = tmp_path / "suite.toml"
    grid = toml_of(suite(seeds=(0,), on={"counted": {"options": {"method": {"pause": 0}}}}))
    settings = {"bad": "nan_at = 8", "short": "steps = 9"}
    rows = [f'{{name = "{name}", method = "counted", options.method.{each}}}' for name, each in settings.items()]
    file.write_text(f'title = "Of <three>"\nrows = [{", ".join(rows)}]\nconcepts.words = ["cat"]\n{grid}')
    with pytest.raises(ErasekitError, match=r"(?s)^FAILED bad: .*stopped at step 8.*2 of 3 cells finished, 1 failed.*--retry"):
        command(file, launcher="in-process", out=tmp_path / "runs", plugin=list(FILES))
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert (folder / "table.md").read_text().count("| counted | ") == 1
    page = (folder / "comparison.html").read_text()
    assert "<h1>Of &lt;three&gt;</h1>" in page
    assert "short" in page
    capsys.readouterr()
    command(file, launcher="in-process", out=tmp_path / "runs", plugin=list(FILES), dry_run=True, as_json=True)
    assert [cell["state"] for cell in json.loads(capsys.readouterr().out)] == ["finished", "failed", "finished"]
    assert counts()[0] == [("cat", 0)] * 2


def test_a_method_that_has_no_use_for_a_seed_is_run_at_the_first_one_only(tmp_path):
    values = {"methods": ("uce", "rece", "sld", "negative-prompt", "speed", "esd"), "tasks": ("objects",), "seeds": (3, 4)}
    shares = {"on": {"uce": {"options": {"method": {"guides": ["a", "b"], "debias_rounds": 1}}}}}
    plain = Suite(**values, concepts={"objects": ("cat", "dog")})

    def seeds(**changes):
        cells = cells_of(plain.model_copy(update=changes), plugins.default(), tmp_path)
        assert len(cells) == len({cell.path for cell in cells})
        cats = [cell for cell in cells if cell.config["concepts"] == ("cat",)]
        assert {cell.config["seed"] for cell in cats} == {3, 4}
        return {cell.row for cell in cats if cell.config["seed"] == 4}

    assert seeds() == {"speed", "esd"}
    assert seeds(**shares) == {"uce", "speed", "esd"}
    assert seeds(run={"attacks": ["seeds"]}) == set(values["methods"])  # they search at random


def test_only_some_cells_are_worked_on_and_shown(suite, counts, tmp_path, capsys):
    file, out = tmp_path / "suite.toml", tmp_path / "runs"
    file.write_text(toml_of(suite(on={"counted": {"options": {"method": {"pause": 0}}}})))
    how = {"launcher": "in-process", "out": out, "plugin": list(FILES), "as_json": True}

    def cells(**more):
        capsys.readouterr()
        command(file, **how, dry_run=True, **more)
        found = json.loads(capsys.readouterr().out)
        return [(*cell["config"]["concepts"], cell["config"]["seed"], cell["state"]) for cell in found]

    assert [cell[:2] for cell in cells()] == BOTH
    assert [cell[:2] for cell in cells(only=["concept=c*"])] == BOTH[:2]
    assert [cell[:2] for cell in cells(only=["seed=1", "seed=0", "concept=dog"])] == BOTH[2:]
    for wrong, line in {"dog": "AXIS=PATTERN", "concepts=dog": "AXIS=PATTERN", "concept=bird": "There are: cat, dog"}.items():
        with pytest.raises(UsageError, match=line):
            cells(only=[wrong])
    command(file, **how, only=["concept=cat", "seed=1"])
    assert counts()[0] == [("cat", 1)]
    assert [cell for cell in cells() if cell[2] == "finished"] == [("cat", 1, "finished")]
    how["out"] = shutil.copytree(out, tmp_path / "copied")  # as from a bucket
    command(file, **how, only=["concept=cat"])
    assert counts()[:2] == ([("cat", 0)], DRAWN)  # the unedited model's images came along


def test_a_report_of_a_sweep_that_was_stopped_shows_what_there_is_and_begins_nothing(suite, counts, tmp_path, capsys):
    file, out = tmp_path / "suite.toml", tmp_path / "runs"
    file.write_text(toml_of(suite(on={"counted": {"options": {"method": {"pause": 0}}}})))
    how = {"launcher": "in-process", "out": out, "plugin": list(FILES)}
    command(file, **how, report_only=True)
    assert "0 of 4 cells finished" in capsys.readouterr().err
    command(file, **how, only=["concept=cat"])
    counts()
    command(file, **how, report_only=True)
    assert "2 of 4 cells finished" in capsys.readouterr().err
    assert counts() == ([], 0, 0)
    tables = [json.loads(path.read_text())["tables"] for path in (out / "sweeps").glob("*/table.json")]
    assert [len(table["rows"]["counted"]["runs"]) for each in tables for table in each] == [2, 2]
    assert len(list((out / "sweeps").glob("*/comparison.html"))) == 2


SUITES = {"smoke": 16, "table1-mini": 308, "newer-mini": 112, "table2-mini": 45, "table2-damped-mini": 72, "objects-mini": 380}
SUITES |= {
    "table1-sd15": 170,
    "table1-flux": 153,
    "table2-sd15": 15,
    "table2-flux": 15,
    "attacks": 360,
    "attacks-sd15": 11,
    "attacks-flux": 11,
}


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_of_ours_can_be_begun(name, tmp_path):
    """The dry run of each, cell by cell; models of full size are only named."""
    path = ROOT / "benchmarks" / "suites" / f"{name}.toml"
    cells = cells_of(read_suite(path), plugins.default(), tmp_path)
    assert not [cell.refused for cell in cells if cell.refused]
    assert (len(cells), len({cell.path for cell in cells})) == (SUITES[name], SUITES[name])


def test_no_suite_of_ours_is_left_out():
    assert {path.stem for path in (ROOT / "benchmarks" / "suites").glob("*.toml")} == set(SUITES)


def test_attacks_have_a_table_of_their_own(tmp_path):
    """Named by the attack, beside the unedited model and the false alarms; their cost is summed over runs."""
    shown = {"acc_e": (0.1, 1.0), "asr[none]": (0.1, 1.0), "asr[hunt]": (0.6, 0.9), "false_alarm[hunt]": (0.05, None)}
    shown["chance[hunt]"] = (0.3, None)
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        metrics = {
            name: Metric(value=value, base=base, ci95=(value, value), n=10, higher_is_better=False, evaluator="e@1")
            for name, (value, base) in shown.items()
        }
        facts = {"method": "pull", "backbone": "tiny", "task": "words", "domain": "mini", "concepts": ("cat",), "seed": seed}
        facts |= {"config_hash": "0", "protocol": {"hash": "p"}, "counts": {}, "timings_s": {}, "peak_memory_mb": 1.0}
        write_result(RunResult(**facts, metrics=metrics, erasure_sha256=str(seed)), folder / "results.json")
        spent = {"spent": {"prompts": 9, "queries": 30, "passes": 400, "seconds": 1.25}}
        (folder / "attacks.json").write_text(json.dumps({"attacks": {"hunt": spent}}))
    [table] = tables_of([Cell("pull", {}, str(seed)) for seed in (0, 1)], tmp_path)
    assert table["rows"]["pull"]["attacks"] == {"hunt": {"prompts": 18, "queries": 60, "passes": 800, "seconds": 2.5}}
    attacks = by_attack(table["rows"])
    assert attacks.columns == ["row", "none", "hunt"]
    assert attacks.rows[0] == ["pull", "0.10 (0.10 to 0.10)", "0.60 (0.60 to 0.60)"]
    alarms, chance = ["never learned", "", "0.05 (0.05 to 0.05)"], ["by chance", "", "0.30 (0.30 to 0.30)"]
    assert attacks.rows[1:] == [["unedited", "1.00", "0.90"], alarms, chance]
    assert by_row(table["rows"]).columns[:2] == ["row", "acc_e"]
    assert not any("asr" in column for column in by_row(table["rows"]).columns)
