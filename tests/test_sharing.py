"""Several at one folder of runs at once: nothing is computed twice, and what a dead one held is free.

They are forked, so that torch is loaded once.
"""

import os
import signal
import time

import pytest

from erasekit.registration import plugins
from erasekit.runs.rundir import AtWork
from erasekit.runs.runner import run
from erasekit.sweeps.cells import cells_of, run_config, seen, write_cells
from erasekit.sweeps.sweep import How, sweep
from erasekit.sweeps.worker import work
from tests.sweeping import BOTH, DRAWN, FILES, IMAGES, counted, grid_of, lines_of, numbers


@pytest.fixture(scope="module")
def registries():
    return plugins.load(FILES)


@pytest.fixture
def counts(tmp_path, monkeypatch):
    """Where it is written down what was done."""
    monkeypatch.setenv("COUNTS", str(tmp_path / "counts.jsonl"))
    return tmp_path / "counts.jsonl"


def forked(task):
    """The number of a process that does a task; its exit code is what the task returns, 70 after an error."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = task()
    finally:
        os._exit(code)


def codes_of(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_twenty_starts_of_one_run_compute_it_once(registries, counts, tiny_folder, tmp_path):
    out = tmp_path / "runs"
    cell = cells_of(grid_of(tiny_folder, seeds=(0,)), registries, out)[0]

    def start():
        try:
            run(run_config(cell), out=out, registries=registries)
        except AtWork:
            return 3
        return 0

    codes = codes_of([forked(start) for _ in range(20)])
    assert 0 in codes
    assert set(codes) <= {0, 3}
    assert seen(cell, out).state == "finished"
    assert counted(lines_of(counts)) == ([("cat", 0)], 2 * DRAWN, 1)
    assert start() == 0  # finished: read, not computed
    assert counted(lines_of(counts)) == ([("cat", 0)], 2 * DRAWN, 1)


def test_two_sweeps_at_one_folder_share_what_both_want(registries, counts, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.sweeps.sweep.POLL_S", 0.05)
    out, how = tmp_path / "runs", How(launcher="in-process", plugins=FILES)
    grids = [grid_of(tiny_folder, seeds=seeds) for seeds in ((0, 1), (1, 0, 2))]

    def start(name, grid):
        return len(sweep(grid, registries, name=name, out=out, how=how).failed)

    assert codes_of([forked(lambda n=n, g=g: start(n, g)) for n, g in zip("ab", grids, strict=True)]) == [0, 0]
    erased, images, _ = counted(lines_of(counts))
    assert erased == sorted([*BOTH, ("cat", 2), ("dog", 2)])
    assert images == IMAGES + 2 * DRAWN
    first, second = (numbers(sweep(grid, registries, name=n, out=out, how=how)) for n, grid in zip("ab", grids, strict=True))
    assert first.items() < second.items()


@pytest.mark.parametrize("locks", ["system", "lease"])
def test_the_cell_of_a_killed_worker_is_gone_on_with(locks, registries, counts, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ERASEKIT_LOCKS", locks)
    out = tmp_path / "runs"
    slow = {"counted": {"options": {"method": {"pause": 0.05}}}}
    cells = cells_of(grid_of(tiny_folder, seeds=(0,), on=slow), registries, out)
    folder = write_cells(cells, out, "killed")
    worker = forked(lambda: work(folder, out, plugins=FILES))
    until = time.monotonic() + 120
    while not seen(cells[0], out).stage.startswith("steps") and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(worker, signal.SIGSTOP)  # it holds its cell, and does nothing
    assert work(folder, out, plugins=FILES) == 1
    assert [seen(cell, out).state for cell in cells] == ["begun", "finished"]
    os.kill(worker, signal.SIGKILL)
    assert codes_of([worker]) == [-signal.SIGKILL]
    assert work(folder, out, plugins=FILES) == 1
    assert [seen(cell, out).state for cell in cells] == ["finished"] * 2
    assert counted(lines_of(counts))[:2] == ([("cat", 0), ("dog", 0)], IMAGES - 2 * DRAWN)
