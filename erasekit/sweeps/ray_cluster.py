"""Workers as tasks of a Ray cluster: one that runs already, or one that is started on this machine."""

from __future__ import annotations

import os
import socket
from importlib import import_module
from typing import Any

from pydantic import Field

from erasekit.errors import EnvironmentProblem, ErasekitError
from erasekit.sweeps.launchers import Job, LauncherConfig
from erasekit.sweeps.worker import GRACE_S, work

REACHED_S = 5.0
TOLD = ("ERASEKIT_", "HF_", "PYTHONPATH")  # beginnings of variables that workers on other machines need too


class RayConfig(LauncherConfig):
    """Settings of the launcher `ray`."""

    address: str = Field("", description="of a cluster; without one, that of RAY_ADDRESS, or one on this machine")
    gpus: float = Field(-1, description="GPUs of each worker, a fraction too; -1 is one where the cluster has any, else none")
    cpus: float = Field(1, gt=0, description="cores of each worker, which has as many threads")


class RayCluster:
    """A task for each worker. That of a node that is lost is started again on another one, where it goes on with the cell."""

    Config = RayConfig
    elsewhere = True

    def __init__(self, config: RayConfig, job: Job) -> None:
        """Join the cluster.

        Raises:
            EnvironmentProblem: Ray is not installed, or there is no cluster at the address.
        """
        try:
            self.ray: Any = import_module("ray")
        except ImportError:
            raise EnvironmentProblem("The launcher 'ray' needs Ray: pip install 'erasekit[ray]'.") from None
        self.config, self.job = config, job
        try:
            _reach(config.address)
            self.ray.init(address=config.address or None, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
        except (OSError, ValueError) as error:
            where, said = config.address or os.environ.get("RAY_ADDRESS", ""), str(error).strip().splitlines()[0]
            raise EnvironmentProblem(
                f"There is no Ray cluster at '{where}' ({said}). Start one: 'ray start --head'."
            ) from error
        there = self.ray.cluster_resources()
        self.gpus = config.gpus if config.gpus >= 0 else float(there.get("GPU", 0) > 0)
        fits = min(int(there.get(name, 0) / each) for name, each in (("CPU", config.cpus), ("GPU", self.gpus)) if each)
        self.workers = job.workers or max(1, fits)
        self._tasks: list[Any] = []

    def start(self) -> None:
        """Start all workers, spread over the nodes."""
        told = {name: value for name, value in os.environ.items() if name.startswith(TOLD)}
        told |= {"OMP_NUM_THREADS": str(max(1, int(self.config.cpus)))}
        task = self.ray.remote(work).options(
            num_cpus=self.config.cpus,
            num_gpus=self.gpus,
            max_retries=-1,  # of a lost node or process; a cell that ends its process is found out by itself
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": told},
        )
        job, everyone = self.job, range(self.workers)
        more = {"plugins": job.plugins, "of": self.workers, "where": job.where}
        self._tasks = [task.remote(job.folder, job.out, number=i, **more) for i in everyone]

    def alive(self) -> int:
        """How many tasks have not ended.

        Raises:
            ErasekitError: one ended with an error that is no cell's.
        """
        if not self._tasks:
            return 0
        ended, self._tasks = self.ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)
        try:
            self.ray.get(ended)
        except self.ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise ErasekitError(f"A worker on Ray cannot work: {last}. See 'ray logs'.") from error
        return len(self._tasks)

    def stop(self) -> None:
        """Interrupt all tasks, which close their runs, and leave the cluster; one that was started for this ends."""
        for task in self._tasks:
            self.ray.cancel(task, force=False)
        if self._tasks:
            self.ray.wait(self._tasks, num_returns=len(self._tasks), timeout=GRACE_S)
        self._tasks = []
        self.ray.shutdown()


def _reach(address: str) -> None:
    """See that somebody listens at an address with a port: Ray itself would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACHED_S).close()
