"""A whole run on a GPU; fails without one."""

import pytest

from erasekit import plugins
from erasekit.config import build
from erasekit.runner import run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_the_gpu_scores_every_picture(world, tiny_folder, tmp_path, dtype):
    flags = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
    overrides = [f"backbone.path={tiny_folder}", "backbone.device=cuda", f"backbone.dtype={dtype}"]
    result = run(build(flags, overrides=overrides), out=tmp_path, registries=plugins.load([world]))
    assert result.counts["failed"] == 0
    assert result.peak_memory_mb > 0
