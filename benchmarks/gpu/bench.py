"""Time and peak memory of every method on SD1.5 and FLUX.1-dev at full size, with random weights.

    python benchmarks/gpu/bench.py --out gpu.json            # one GPU; go on with the same command
    python benchmarks/gpu/bench.py --out tiny.json --tiny    # the same on a CPU at tiny size
    python benchmarks/gpu/bench.py --out cpu.json --device cpu --row-limit 3600    # full size on a CPU, cut to very few steps

README.md beside this file says what is measured.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

import torch  # noqa: E402
from metadata import write_metadata  # noqa: E402
from models import DONE  # noqa: E402
from row import Row  # noqa: E402

TRAINED = ("trace", "esd", "mace", "eraseanything", "ant")
NEWER = ("gem", "stereo", "advunlearn", "spm", "eraseflow")

# The most telling come first: a budget may end the list anywhere.
ROWS = (
    Row("sd15", "trace", 512, "24", whole=True, sampled=True),
    Row("flux", "uce", 512, "80", sampled=True),
    *(Row("flux", method, 512, "80") for method in TRAINED),
    Row("flux", "trace", 512, "48"),
    Row("flux", "trace", 512, "24"),
    Row("flux", "trace", 512, "32"),
    Row("flux", "uce", 512, "24", sampled=True),
    *(Row("sd15", method, 512, "8") for method in TRAINED),
    Row("sd15", "uce", 512, "8", sampled=True),
    Row("flux", "uce", 1024, "80", sampled=True),
    Row("flux", "trace", 1024, "80"),
    Row("flux", "trace", 1024, "48"),
    *(Row("flux", method, 512, "48") for method in TRAINED[1:]),
    *(Row("flux", method, 1024, "80") for method in TRAINED[1:]),
    *(Row("flux", method, 512, "24") for method in TRAINED[1:]),
    Row("flux", "trace", 1024, "24"),
    *(Row("flux", "trace", 512, vram) for vram in ("16", "12")),
    Row("flux", "uce", 512, "8", sampled=True),
    *(Row("sd15", method, 512, "80") for method in TRAINED),
    *(Row("sd15", method, 512, "8") for method in NEWER),
    *(Row("flux", method, 512, "80") for method in NEWER),
    *(Row("sd15", method, 512, "8", few=True) for method in ("uce", "speed", "rece", *TRAINED, *NEWER)),
    Row("flux", "uce", 512, "80", few=True),
)


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text()) if path.is_file() else {"machine": machine(), "rows": {}}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def machine() -> dict[str, Any]:
    """What the results were measured on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else 0.0
    device = torch.cuda.get_device_name() if gpu else "cpu"
    return {"device": device, "gb": round(memory, 2), "threads": torch.get_num_threads(), "versions": versions}


def environment(work: Path) -> dict[str, str]:
    """Children find erasekit and its plugins in this checkout, installed or not."""
    paths = [ROOT, ROOT / "plugins", write_metadata(work / "metadata")]
    found = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": found, "HF_HUB_OFFLINE": "1"}


def child(command: list[Any], work: Path, seconds: float) -> tuple[str, float]:
    """Run a script beside this one; why it failed in one line ("" if it did not), and its seconds."""
    began = time.monotonic()
    with (work / "stderr").open("w+") as log:
        try:
            arguments = [sys.executable, *map(str, command)]
            options = {"env": environment(work), "stdout": log, "stderr": log, "timeout": seconds, "check": False}
            code = subprocess.run(arguments, **options).returncode
            log.seek(0)
            last = (log.read().strip().splitlines() or [""])[-1]
            problem = f"exit status {code}: {last}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s"
    return problem, round(time.monotonic() - began, 2)


def built(family: str, work: Path, args: argparse.Namespace, results: dict[str, Any]) -> Path:
    """The folder of a model, written if it is not there."""
    kind = "tiny" if args.tiny else "holes" if (family, args.device) == ("flux", "cpu") else ""
    folder = work / (f"{family}-{kind}" if kind else family)
    if not (folder / DONE).is_file():
        command = [HERE / "models.py", family, folder, "--device", args.device, *([f"--{kind}"] if kind else [])]
        problem, seconds = child(command, work, seconds=600)
        if problem:
            raise SystemExit(f"The model '{family}' could not be written: {problem}")
        results.setdefault("build_s", {})[family] = seconds
        print(f"{family} written in {seconds:.0f} s", flush=True)
    return folder


def measured(row: Row, base: Path, work: Path, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A row's result, with `failed` saying why it has no more."""
    out = work / f"{row.name}.json"
    out.unlink(missing_ok=True)
    given = row._replace(size=16) if args.tiny else row
    command = [HERE / "row.py", json.dumps(given._asdict()), "--base", base, "--device", args.device, "--out", out]
    problem, wall = child(command, work, seconds)
    result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    return result | {"wall_s": wall} | ({"failed": result.get("failed") or problem} if problem or "failed" in result else {})


def wanted(args: argparse.Namespace, results: dict[str, Any]) -> list[Row]:
    """The rows that are asked for and not there yet; at full size a CPU measures those of few steps, a GPU the others."""
    chosen = [row for row in ROWS if any(fnmatch.fnmatch(row.name, pattern) for pattern in args.rows)]
    chosen = [row for row in chosen if args.tiny or row.few == (args.device == "cpu")]
    done = {name for name, result in results["rows"].items() if not (args.retry and "failed" in result)}
    return [row for row in chosen if row.name not in done]


def line(name: str, result: dict[str, Any]) -> str:
    """A row of the terminal."""
    held = "allocated_gb" if torch.cuda.is_available() else "resident_gb"
    peak = max((stage[held] for stage in result.get("stages", {}).values()), default=0.0)
    said = f"FAILED {result['failed']}" if "failed" in result else f"step {result.get('step_s', '-')} s"
    return f"{name:28} {result['wall_s']:7.1f} s  peak {peak:6.2f} GB  {said}"


def run(args: argparse.Namespace, work: Path) -> None:
    """Measure what is missing, within the budget."""
    work.mkdir(parents=True, exist_ok=True)
    began, results = time.monotonic(), read(args.out)
    for row in wanted(args, results):
        if time.monotonic() - began >= args.budget:
            print("The budget is spent; the same command goes on.", flush=True)
            break
        base = built(row.family, work, args, results)
        left = args.budget - (time.monotonic() - began)
        result = measured(row, base, work, args, min(args.row_limit, left))
        if "failed" in result and result["wall_s"] >= left:  # cut by the budget, not by itself: measured again
            break
        results["rows"][row.name] = result
        write(args.out, results)
        print(line(row.name, result), flush=True)


def main() -> None:
    """Measure."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--out", type=Path, required=True, help="results; rows that are in it are not measured again")
    args.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="names such as flux-trace-512-80, or flux-*")
    args.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="no row goes on for longer")
    args.add_argument("--row-limit", type=float, default=300.0, metavar="SECONDS", help="what a single row may take")
    args.add_argument("--retry", action="store_true", help="measure rows again that failed")
    args.add_argument("--list", action="store_true", help="print the names of the rows, and measure nothing")
    args.add_argument("--work", type=Path, help="where models are kept for the next call; 37 GB")
    args.add_argument("--device", default="cuda")
    args.add_argument("--tiny", action="store_true", help="tiny models, no limit on memory")
    args = args.parse_args()
    args.device = "cpu" if args.tiny else args.device
    if args.list:
        print("\n".join(row.name for row in ROWS))
    elif args.work:
        run(args, args.work)
    else:
        with tempfile.TemporaryDirectory() as work:
            run(args, Path(work))


if __name__ == "__main__":
    main()
