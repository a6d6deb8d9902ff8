"""A real Slurm on one machine, started for the test: its jobs are queued again in the middle of their cells.

Needs Debian's packages slurmctld, slurmd and slurm-client, and root.
"""

import os
import shutil
import socket
import subprocess
import time

import pytest

from erasekit.registration import plugins
from erasekit.sweeps.sweep import How, sweep
from tests.sweeping import BOTH, FILES, IMAGES, counted, grid_of, lines_of, numbers

CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def told(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A controller and a node of two cores, with a queue that is their own."""
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ctld=free_port(), slurmd=free_port()))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    daemons = []
    for name in ("slurmctld", "slurmd"):
        with (folder / f"{name}.log").open("w") as log:
            daemons.append(subprocess.Popen([shutil.which(name, path=path), "-D"], stdout=log, stderr=log))
    until = time.monotonic() + 60
    while "idle" not in told("sinfo", "-h", "-o", "%T") and time.monotonic() < until:
        time.sleep(0.2)
    assert "idle" in told("sinfo", "-h", "-o", "%T"), (folder / "slurmd.log").read_text()
    yield
    told("scancel", "--me")
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(30)


def test_jobs_that_slurm_queues_again_go_on(slurm, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTS", str(tmp_path / "counts.jsonl"))
    registries, file = plugins.load(FILES), tmp_path / "counts.jsonl"
    grid = grid_of(tiny_folder, on={"counted": {"options": {"method": {"pause": 0.2}}}})
    at_work, queue = [], set()

    def watch(cells):
        stages = [state.stage for _, state in cells if state.state == "begun"]
        at_work.append(len(stages))
        if not queue and len(stages) == 2 and all(stage.startswith("steps") for stage in stages):
            queue.update(told("squeue", "-h", "-r", "-o", "%i").split())
            subprocess.run(["scontrol", "requeue", *queue], check=True)
        for job in queue:  # Slurm would let it wait for two minutes
            told("scontrol", "update", f"JobId={job}", "StartTime=now")

    how = How(launcher="slurm", workers=2, settings={"minutes": 10}, plugins=FILES)
    swept = sweep(grid, registries, name="slurm", out=tmp_path / "runs", how=how, watch=watch)
    assert max(at_work) == len(queue) == 2
    assert not swept.failed
    assert counted(lines_of(file))[:2] == (BOTH, IMAGES)
    assert len([line for line in lines_of(file) if "loaded" in line]) > 2  # by two jobs, then by those that came back
    alone = sweep(grid, registries, name="alone", out=tmp_path / "alone", how=How(launcher="in-process", plugins=FILES))
    assert numbers(swept) == numbers(alone)
