"""What the other processes of a run do beside the first one: their share of the images and of the training."""

from __future__ import annotations

from pathlib import Path

from erasekit.erasures.manifest import read_manifest
from erasekit.evaluation.results import RunResult, read_result
from erasekit.processes import here
from erasekit.registration.plugins import Registries
from erasekit.runs.compute import compute, context, expect
from erasekit.runs.current import Run
from erasekit.runs.drawing import base_images, erased_images
from erasekit.runs.kept import Kept
from erasekit.runs.plan import Plan
from erasekit.runs.rundir import RunDirectory, path_of


def assist(plan: Plan, out: Path, registries: Registries, kept: Kept) -> RunResult:
    """Go through a run beside the process that writes it, and read its result at the end.

    All that is random has its own generator, so that every process comes to the same weights; images are drawn into the cache
    that all runs share. The first process says what is finished already.
    """
    path = path_of(out, plan)
    if not here().says(False):  # the run is finished
        this = Run(plan, registries, RunDirectory(path, {}), emit=lambda event: None)
        backbone = kept.load(plan)
        backbone.encode(["", *(p.text for p in this.prompts)])
        expect(plan, context(plan, backbone, registries))
        base_images(this, backbone, cache=out / "cache")
        if not here().says(False):  # there is an erasure
            compute(plan, backbone, registries, directory=path)
        here().wait()
        erased_images(this, backbone, read_manifest(path / "erasure")["erasure_sha256"], cache=out / "cache")
        here().wait()
    return read_result(path / "results.json")
