import errno
import json
import os
import subprocess
import sys
import tomllib

import pytest

from erasekit.cli.ends import code_of
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation.results import write_result
from erasekit.events import StepEnd
from erasekit.registration import plugins
from erasekit.runs.config import RunConfig, build
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import AtWork, open_run, path_of
from tests.test_results import result


@pytest.fixture(scope="module")
def plan(world):
    flags = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat:kitten",)}
    return resolve(build(flags), plugins.load([world]))


def refused(kind, says):
    """The block ends with this error, in one line."""
    return pytest.raises(kind, match=rf"^[^\n]*{says}[^\n]*$")


def test_a_run_goes_from_new_over_partial_to_finished(tmp_path, plan):
    with open_run(tmp_path, plan) as run:
        assert run.path == tmp_path / "tiny" / "words" / "pull" / plan.hash
        assert run.state == "new"
        with run.stage("load"):
            pass
        with pytest.raises(KeyError), run.stage("erase"):
            raise KeyError("x")
    with open_run(tmp_path, plan) as run:
        assert run.state == "partial"
        assert run.done("load")
        assert not run.done("erase")
        assert set(run.timings_s) == {"load", "erase"}
        write_result(result(), run.path / "results.json")
        run.write_status("finished")
    with open_run(tmp_path, plan) as run:
        assert run.state == "finished"
        assert json.loads((run.path / "status.json").read_text())["state"] == "finished"
    with open_run(tmp_path, plan, force=True) as run:
        assert run.state == "new"
        assert not (run.path / "results.json").exists()


def test_a_finished_status_without_results_is_not_finished(tmp_path, plan):
    with open_run(tmp_path, plan) as run:
        run.write_status("finished")
    with open_run(tmp_path, plan) as run:
        assert run.state == "partial"


def test_what_is_written_about_a_run_names_no_machine(tmp_path, plan):
    with open_run(tmp_path, plan) as run:
        config = RunConfig.model_validate(tomllib.loads((run.path / "config.toml").read_text()))
        environment = (run.path / "env.json").read_text()
    assert config == plan.config
    assert json.loads(environment)["versions"]["torch"]
    assert os.uname().nodename not in environment
    assert "/" not in environment


def test_events_are_lines_of_the_log(tmp_path, plan):
    with open_run(tmp_path, plan) as run:
        run.log(StepEnd(1, 2, {"loss": 0.5}))
        run.log(StepEnd(2, 2, {"loss": 0.25}))
        lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [line["values"]["loss"] for line in lines] == [0.5, 0.25]
    assert {line["event"] for line in lines} == {"StepEnd"}


def test_two_at_once_are_refused_and_a_dead_one_holds_nothing(tmp_path, plan):
    with (
        open_run(tmp_path, plan),
        pytest.raises(EnvironmentProblem, match="Another process is at work"),
        open_run(tmp_path, plan),
    ):
        pass
    path = path_of(tmp_path, plan)
    hold = (  # the lock is let go of when its object is, so it needs a name
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True);"
        "import time; time.sleep(60)"
    )
    lock = path.with_name(f".{path.name}.lock")
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with refused(EnvironmentProblem, "Another process"), open_run(tmp_path, plan):
            pass
        other.kill()
    with open_run(tmp_path, plan) as run:
        assert run.state == "partial"


def test_a_file_in_the_way_is_one_line(tmp_path, plan):
    (tmp_path / "out").write_text("")
    with (
        pytest.raises(UsageError, match=r"Cannot write to .*Choose another folder with --out"),
        open_run(tmp_path / "out", plan),
    ):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error (os error 28)")])
def test_a_full_disk_is_one_line_and_keeps_what_is_done(tmp_path, plan, error):
    with refused(EnvironmentProblem, "is full"), open_run(tmp_path, plan) as run:
        with run.stage("load"):
            pass
        raise error
    with open_run(tmp_path, plan) as run:
        assert run.done("load")


def test_a_full_disk_is_said_outside_of_a_run_too(capsys):
    """As when `erase` writes a checkpoint: safetensors has an error of its own for it."""
    assert code_of(RuntimeError("I/O error: No space left on device (os error 28)")) == 3
    assert capsys.readouterr().err == "The disk is full. Free some space, and run the same command again.\n"


def test_other_errors_pass_through(tmp_path, plan):
    with pytest.raises(OSError, match="elsewhere"), open_run(tmp_path, plan):
        raise OSError(errno.EACCES, "elsewhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_damaged_status_is_no_dead_end(tmp_path, plan, text):
    with open_run(tmp_path, plan) as run, run.stage("load"):
        pass
    (run.path / "status.json").write_text(text)
    with open_run(tmp_path, plan) as run:
        assert run.state == "new"  # what is done shows by the files that are there
        with run.stage("load"):
            pass
    with open_run(tmp_path, plan) as run:
        assert run.done("load")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 9}'])
def test_damaged_results_are_measured_again(tmp_path, plan, text):
    with open_run(tmp_path, plan) as run:
        (run.path / "results.json").write_text(text)
        run.write_status("finished")
    with open_run(tmp_path, plan) as run:
        assert run.state == "partial"


def test_a_written_claim_is_respected_and_a_dead_holders_is_taken_over(tmp_path, plan, monkeypatch):
    """For disks without locks between machines. On one machine a holder that is gone is known by its process."""
    monkeypatch.setenv("ERASEKIT_LOCKS", "lease")
    hold = (
        "import sys, pathlib; from erasekit.atomic import lock_of; lock = lock_of(pathlib.Path(sys.argv[1])); lock.acquire();"
        "print('held', flush=True); import time; time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(path_of(tmp_path, plan))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with refused(AtWork, "Another process"), open_run(tmp_path, plan):
            pass
        other.kill()
    with open_run(tmp_path, plan) as run:
        assert run.state == "new"
    monkeypatch.setenv("ERASEKIT_LOCKS", "leash")
    with refused(UsageError, "Set it to one of: system, lease"), open_run(tmp_path, plan):
        pass


def test_a_run_knows_how_often_it_was_begun_in_vain(tmp_path, plan):
    for times in (1, 2, 3):
        with open_run(tmp_path, plan) as run:
            assert run.starts == times
    with open_run(tmp_path, plan) as run:
        with run.stage("load"):
            pass
        assert run.starts == 1
    with open_run(tmp_path, plan) as run:
        assert run.starts == 2
