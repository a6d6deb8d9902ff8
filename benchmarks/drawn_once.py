"""What it saves that an image of the unedited model is drawn once: ten objects on sd15-mini, erased one by one.

    python benchmarks/drawn_once.py --work drawn-once --out benchmarks/results/drawn-once.json
    python benchmarks/drawn_once.py --out benchmarks/results/drawn-once.json --table
    python benchmarks/drawn_once.py --jobs 16 ...       # so many processes at a time

Apart: `erasekit run --concept NAME --out FOLDER` for each concept and each method, every one in a folder of its own, so that
none finds what another has drawn. Together: one `erasekit run` for each method, without a concept, both in one folder. Images
are files in the folders' caches. Seconds are of the processes, their start included. What is done is in the JSON file, and not
done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import record

METHODS = ("uce", "trace")
CONCEPTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def timed(method: str, concept: str, limit: int, settings: Sequence[str], out: Path) -> dict[str, Any]:
    """Do a run in a process of its own: its wall and CPU seconds, and the metrics of each concept."""
    shutil.rmtree(out / "sd15-mini" / "objects" / method, ignore_errors=True)  # of a run that was stopped
    command = [sys.executable, "-m", "erasekit", "run", "--method", method, "--backbone", "sd15-mini", "--task", "objects"]
    command += ["--limit", str(limit), "--out", str(out), "--json", "-s", "backbone.device=cpu"]
    command += [word for setting in settings if setting.startswith(f"{method}:") for word in ("-s", setting.split(":", 1)[1])]
    start = time.monotonic()
    process = subprocess.Popen([*command, *(["--concept", concept] if concept else [])], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"'{' '.join(command)}' failed.")
    results = [json.loads(path.read_text()) for path in sorted(out.glob(f"sd15-mini/objects/{method}/*/results.json"))]
    metrics = {
        "+".join(r["concepts"]): {name: m["value"] for name, m in r["metrics"].items()}
        for r in results
        if len(r["concepts"]) == 1
    }
    seconds = {"wall_s": round(time.monotonic() - start, 1), "cpu_s": round(usage.ru_utime + usage.ru_stime, 1)}
    return {**seconds, "base_images": images(out, "base"), "erased_images": images(out, "erased"), "metrics": metrics}


def images(out: Path, which: str) -> int:
    """How many images of the unedited model, or of erased ones, a folder of runs has drawn."""
    return len(list(out.glob(f"cache/{which}/*/*.png")))


def table(measured: dict[str, Any]) -> str:
    """The table of the README."""
    lines = ["| | processes | images of the base | erased images | wall, s | CPU, s |", "|---|---|---|---|---|---|"]
    for how in ("apart", "together"):
        runs = [run for key, run in measured.items() if key.startswith(how)]
        # Both methods share one folder, where the one that ends last counts the images of both.
        counts = [[run[key] for run in runs] for key in ("base_images", "erased_images")]
        drawn = [max(count) if how == "together" else sum(count) for count in counts]
        spent = [sum(r[k] for r in runs) for k in ("wall_s", "cpu_s")]
        lines.append(f"| {how} | {len(runs)} | {drawn[0]} | {drawn[1]} | {spent[0]:.0f} | {spent[1]:.0f} |")
    return "\n".join(lines)


def unequal(measured: dict[str, Any]) -> list[str]:
    """The numbers that are not the same in both ways."""
    found: dict[str, dict[tuple[str, str, str], Any]] = {"apart": {}, "together": {}}
    for key, run in measured.items():
        how, method = key.split()[:2]
        found[how] |= {(method, c, m): v for c, metrics in run["metrics"].items() for m, v in metrics.items()}
    keys = {*found["apart"], *found["together"]}
    return [" ".join(key) for key in sorted(keys) if found["apart"].get(key) != found["together"].get(key)]


def main() -> None:
    """Measure what is missing, and write it down after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("drawn-once"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--set", action="append", default=[], metavar="METHOD:KEY=VALUE", help="a setting of a method's runs")
    parser.add_argument("--note", default="", help="what a reader of the seconds has to know")
    parser.add_argument("--table", action="store_true", help="only print the table")
    given = parser.parse_args()
    before = json.loads(given.out.read_text()) if given.out.is_file() else {}
    measured: dict[str, Any] = before.get("runs", {})
    if not given.table:
        made = {**record.machine(), "limit": given.limit, "settings": given.set, "note": given.note}

        def do(method: str, concepts: Sequence[str], folder: Path) -> None:
            for concept in concepts:
                key = " ".join(filter(None, ("apart" if concept else "together", method, concept)))
                if key not in measured:
                    measured[key] = timed(method, concept, given.limit, given.set, folder)
                    record.write({**made, "runs": dict(sorted(measured.items()))}, given.out)

        with ThreadPoolExecutor(given.jobs) as pool:
            jobs = [pool.submit(do, m, [""], given.work / "together") for m in reversed(METHODS)]
            jobs += [pool.submit(do, m, [c], given.work / f"{m}-{c}") for m in reversed(METHODS) for c in CONCEPTS]
        for job in jobs:
            job.result()
    print(table(measured))
    differing = unequal(measured)
    print(f"\nNumbers that differ: {', '.join(differing) or 'none'}.")


if __name__ == "__main__":
    main()
