"""The tiny world, with every erasure and every drawn batch written down: a line each in the file that `COUNTS` names."""

from __future__ import annotations

import json
import os
import time
from typing import ClassVar

from pydantic import Field

from erasekit import hookimpl
from erasekit.sweeps.launchers import LauncherConfig
from erasekit.sweeps.worker import work
from erasekit.testing.tiny import TinySD
from erasekit.testing.world import Pull, PullConfig


def count(**what):
    """Append a line, whole: several processes may do so at once."""
    with open(os.environ["COUNTS"], "ab", buffering=0) as file:
        file.write(f"{json.dumps(what)}\n".encode())


class CountedSD(TinySD):
    """Counts the images that its pipeline is asked for, and how often it is loaded."""

    name: ClassVar[str] = "counted"

    @classmethod
    def load(cls, config):
        count(loaded=os.getpid())
        return super().load(config)

    def call_arguments(self, cond, *, empty, guidance):
        count(images=len(cond), pid=os.getpid())
        return super().call_arguments(cond, empty=empty, guidance=guidance)


class CountedConfig(PullConfig):
    """Settings."""

    pause: float = Field(0.0, description="seconds that each training step waits")
    fall: int = Field(-1, description="the process is gone at this step; -1 for never")


class Counted(Pull):
    """Counts the erasures that were computed to the end."""

    name = "counted"
    Config = CountedConfig
    ablations = {"in two steps": {"steps": 2}, "nothing": {"steps": 0}}

    def erase(self, ctx):
        log = ctx.log

        def slowly(step, total, values):
            time.sleep(self.config.pause)
            log(step, total, values)
            if step == self.config.fall:
                os.kill(os.getpid(), 9)

        ctx.log = slowly
        erasure = super().erase(ctx)
        count(erased=ctx.concepts[0].name, seed=ctx.seed)
        return erasure


class InProcess:
    """A launcher whose one worker is the process that asks how it is."""

    Config = LauncherConfig
    elsewhere = False

    def __init__(self, config, job):
        self.job = job

    def start(self):
        self.left = True

    def alive(self):
        if self.left:
            work(self.job.folder, self.job.out, plugins=self.job.plugins)
        self.left = False
        return 0

    def stop(self):
        self.left = False


@hookimpl
def register_launchers(register):
    register("in-process", InProcess, summary="one worker, here")


@hookimpl
def register_backbones(register):
    register("counted", CountedSD, summary="counts")


@hookimpl
def register_methods(register):
    register("counted", Counted, summary="counts")
