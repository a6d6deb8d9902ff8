"""Workers on this machine: one for each GPU, or some that share the CPU's threads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import IO

from pydantic import Field

from erasekit.errors import ErasekitError
from erasekit.sweeps.launchers import Job, LauncherConfig
from erasekit.sweeps.worker import GRACE_S, INTERRUPTED, STARTS

EARLY_S = 30.0


class LocalConfig(LauncherConfig):
    """Settings of the launcher `local`."""

    threads: int = Field(0, ge=0, description="threads of each worker; 0 divides those of the machine among all")


class Local:
    """A process for each worker. One that is killed is started again; its cell is gone on with."""

    Config = LocalConfig
    elsewhere = False

    def __init__(self, config: LocalConfig, job: Job) -> None:
        """See which GPUs there are."""
        self.gpus = gpus()
        self.job, self.workers = job, job.workers or len(self.gpus) or 1
        self.threads = config.threads or max(1, threads() // self.workers)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._begun: dict[int, float] = {}
        self._early: dict[int, int] = {}

    def start(self) -> None:
        """Start all workers."""
        for number in range(self.workers):
            self._start(number)

    def _start(self, number: int) -> None:
        job = self.job
        command = [sys.executable, "-m", "erasekit.sweeps.worker", str(job.folder), str(job.out)]
        command += ["--number", str(number), "--of", str(self.workers)]
        command += [word for plugin in job.plugins for word in ("--plugin", str(plugin))]
        environment = os.environ | {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
        self._begun[number] = time.monotonic()
        with self._log(number) as log:
            self._processes[number] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def _log(self, number: int) -> IO[bytes]:
        return (self.job.folder / f"worker-{number}.log").open("ab")

    def alive(self) -> int:
        """How many are at work; those that were killed are started again.

        Raises:
            ErasekitError: a worker ended with an error that is no cell's; says which, in one line.
        """
        for number, process in list(self._processes.items()):
            ended = process.poll()
            if ended is not None:
                del self._processes[number]
            if ended:
                self._again(number, ended)
        return len(self._processes)

    def _again(self, number: int, ended: int) -> None:
        """Start a worker again that was killed (no memory, a crash, somebody), but not over and over at its very start."""
        early = time.monotonic() - self._begun[number] < EARLY_S
        self._early[number] = self._early.get(number, 0) + 1 if early else 0
        if (ended < 0 or ended == INTERRUPTED) and self._early[number] < STARTS:
            self._start(number)
            return
        log = self.job.folder / f"worker-{number}.log"
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit code {ended}"])[-1]
        raise ErasekitError(f"Worker {number} cannot work: {last}. See '{log}'.")

    def stop(self) -> None:
        """Close every worker's standard input, at which it ends in order; one that does not is killed."""
        for process in self._processes.values():
            if process.stdin:
                process.stdin.close()
        for process in self._processes.values():
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = {}


def gpus() -> list[str]:
    """The GPUs of this machine, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def threads() -> int:
    """How many threads there are for all workers together: as `OMP_NUM_THREADS` says, or one for each core."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return (
        int(told)
        if told.isdigit()
        else len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
