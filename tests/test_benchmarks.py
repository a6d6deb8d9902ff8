"""The benchmarks run: at tiny size, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_gpu_benchmark_runs_at_tiny_size(tmp_path):
    script = ROOT / "benchmarks" / "gpu" / "bench.py"
    arguments = ["--tiny", "--device", "cpu", "--steps", "2", "--vram", "80", "8", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")])}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for family in ("sd15", "flux"):
        report = json.loads((tmp_path / f"gpu-{family}-tiny.json").read_text())
        assert report["methods"]["trace"]["step_s"] > 0
        assert [report["vram"][v]["erase_s"] > 0 for v in ("80", "8")] == [True, True]
        assert report["raw"]["trace_ratio"] > 0
        assert report["sampling"]["erasekit_pictures_per_s"] > 0
