"""Workers as jobs of Slurm: an array, through submitit, whose jobs are queued again when they are preempted."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.sweeps.launchers import Job, LauncherConfig
from erasekit.sweeps.worker import leave_in_order, work

TIMEOUTS = 100  # how often a job may run out of its time and be queued again


class SlurmConfig(LauncherConfig):
    """Settings of the launcher `slurm`."""

    cluster: Literal["slurm", "local"] = Field("slurm", description="`local` runs the same jobs on this machine, for trying")
    minutes: int = Field(240, ge=1, description="time limit of a job; one that reaches it is queued again")
    partition: str = Field("", description="where the jobs run; Slurm's default, if left out")
    gpus: int = Field(0, ge=0, description="GPUs of each job")
    cpus: int = Field(1, ge=1, description="cores of each job, which has as many threads")
    memory_gb: float = Field(0, ge=0, description="memory of each job; Slurm's default, if left out")
    sbatch: dict[str, Any] = Field(default_factory=dict, description="other options of sbatch, e.g. {account = 'x'}")


class Worker:
    """A worker as submitit hands it to a job: called there, and again when the job was queued again."""

    def __init__(self, job: Job, number: int, of: int) -> None:
        """Take what `erasekit.sweeps.worker.work` needs."""
        self.folder, self.out, self.plugins = str(job.folder), str(job.out), [str(path) for path in job.plugins]
        self.number, self.of, self.where = number, of, str(job.where)

    def __call__(self) -> int:
        """Work; how many cells were done.

        Where submitit queues the job again it ends the process by an exit, which the run that is open would take for its own
        failure. So the run is interrupted instead, and the exit follows.
        """
        signal.signal(signal.SIGTERM, leave_in_order)
        plugins, ends = [Path(path) for path in self.plugins], list[SystemExit]()
        queue_again: Any = signal.getsignal(signal.SIGUSR2)

        def interrupt(*signalled: Any) -> None:
            try:
                queue_again(*signalled)
            except SystemExit as end:
                ends.append(end)
                raise KeyboardInterrupt from None

        if callable(queue_again):
            signal.signal(signal.SIGUSR2, interrupt)
        more: dict[str, Any] = {"number": self.number, "of": self.of, "where": Path(self.where)}
        try:
            return work(Path(self.folder), Path(self.out), plugins=plugins, **more)
        except KeyboardInterrupt:
            raise (ends[0] if ends else KeyboardInterrupt) from None

    def checkpoint(self) -> Any:
        """What submitit queues again before the time is over: the same, since all that is done lies in run directories."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Slurm:
    """An array of jobs. Its workers outlive the command that submitted them, unless that is interrupted."""

    Config = SlurmConfig
    elsewhere = True

    def __init__(self, config: SlurmConfig, job: Job) -> None:
        """Prepare the array.

        Raises:
            UsageError: nobody said how many jobs, or sbatch does not know an option.
            EnvironmentProblem: submitit or Slurm is not there.
        """
        try:
            import submitit
        except ImportError:
            raise EnvironmentProblem("The launcher 'slurm' needs submitit: pip install 'erasekit[slurm]'.") from None
        if not job.workers:
            raise UsageError("Say how many jobs are to run at once: --workers 16.")
        self.config, self.job = config, job
        try:
            self.executor = submitit.AutoExecutor(job.folder / "jobs", cluster=config.cluster, slurm_max_num_timeout=TIMEOUTS)
        except RuntimeError as error:
            raise EnvironmentProblem(f"Slurm is not here: {error}. Submit from a machine that has 'sbatch'.") from error
        self.executor.update_parameters(**_parameters(config))
        self._jobs: list[Any] = []

    def start(self) -> None:
        """Submit the array."""
        workers = [Worker(self.job, number, self.job.workers) for number in range(self.job.workers)]
        with self.executor.batch():
            self._jobs = [self.executor.submit(worker) for worker in workers]

    def alive(self) -> int:
        """How many jobs are at work or in the queue."""
        if self.config.cluster == "local":
            return sum(not job.done() for job in self._jobs)
        return _queued(sorted({job.job_id.partition("_")[0] for job in self._jobs}))

    def stop(self) -> None:
        """Cancel what is left of the array."""
        for job in self._jobs:
            if self.config.cluster == "slurm" or not job.done():
                job.cancel(check=False)
        self._jobs = []


def _parameters(config: SlurmConfig) -> dict[str, Any]:
    """The settings in submitit's words."""
    threads = [f"export {name}={config.cpus}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    path = os.environ.get("PYTHONPATH")
    found: dict[str, Any] = {
        "name": "erasekit",
        "timeout_min": config.minutes,
        "cpus_per_task": config.cpus,
        "slurm_setup": threads + ([f"export PYTHONPATH={shlex.quote(path)}"] if path else []),
        "slurm_additional_parameters": {"requeue": True, **config.sbatch},
    }
    given = {"gpus_per_node": config.gpus, "mem_gb": config.memory_gb, "slurm_partition": config.partition}
    return found | {name: value for name, value in given.items() if value}


def _queued(arrays: list[str]) -> int:
    """How many jobs of some arrays Slurm has in its queue, at work or waiting; it forgets those that have ended."""
    count = 0
    for array in arrays:
        told = subprocess.run(["squeue", "-h", "-r", "-o", "%i", "-j", array], capture_output=True, text=True, check=False)
        count += len(told.stdout.split())
    return count
