"""What a sweep costs beside its runs, and how often the unedited model draws an image that several runs want.

    OMP_NUM_THREADS=1 python benchmarks/engine.py --out benchmarks/results/engine.json

The cells of a suite are done three times, each in a folder of its own: by a shell loop of `erasekit run`, by a sweep with one
worker, and by a sweep with two. All give the same numbers, which is checked. CPU seconds are those of all processes. Then
three closed forms erase each of ten objects, and the unedited model's images are counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from erasekit.runs.config import build, to_toml
from record import machine, write

SUITES = Path(__file__).parent / "suites"
OBJECTS = """
methods = ["uce", "rece", "negative-prompt"]
tasks = ["objects"]
[run]
limit = 5
"""


def erasekit(*arguments: str | Path) -> str:
    """What the command line prints."""
    command = [sys.executable, "-m", "erasekit", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def cells(suite: Path, out: Path) -> list[dict[str, Any]]:
    """The cells of a suite: `config`, `path` and how far each is."""
    found: list[dict[str, Any]] = json.loads(erasekit("sweep", suite, "--out", out, "--dry-run", "--json"))
    return found


def configs(suite: Path, out: Path) -> None:
    """A config file for each run of a suite, as a shell loop would have them."""
    out.mkdir()
    for number, cell in enumerate(cells(suite, out)):
        (out / f"{number:02}.toml").write_text(to_toml(build(cell["config"])))


def loop(suite: Path, out: Path) -> None:
    """The runs of a suite, one after the other, a process each."""
    for file in sorted(out.glob("*.toml")):
        erasekit("run", "--config", file, "--out", out)


def sweep(suite: Path, out: Path, workers: int) -> None:
    """The same by a sweep."""
    erasekit("sweep", suite, "--out", out, "--workers", str(workers))


WAYS = {
    "a shell loop": loop,
    "a sweep, one worker": lambda suite, out: sweep(suite, out, 1),
    "a sweep, two workers": lambda suite, out: sweep(suite, out, 2),
}


def numbers(suite: Path, out: Path) -> dict[str, Any]:
    """The metrics of every cell, and the hash of its erasure."""
    results = {cell["path"]: json.loads((out / cell["path"] / "results.json").read_text()) for cell in cells(suite, out)}
    return {path: (result["erasure_sha256"], result["metrics"]) for path, result in results.items()}


def seconds() -> float:
    """CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(way: str, suite: Path, work: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of one way through a suite, and the numbers that came of it."""
    out = work / way.replace(" ", "-").replace(",", "")
    configs(suite, out)
    cpu, wall = seconds(), time.monotonic()
    WAYS[way](suite, out)
    found = {"cpu_s": round(seconds() - cpu, 1), "wall_s": round(time.monotonic() - wall, 1)}
    return found, numbers(suite, out)


def images(work: Path) -> dict[str, int]:
    """Images of the unedited model that runs of ten objects have, and those that were drawn for them."""
    suite, out = work / "objects.toml", work / "objects"
    suite.write_text(OBJECTS)
    sweep(suite, out, 2)
    runs = [out / cell["path"] / "images" / "base" / "index.json" for cell in cells(suite, out)]
    had = [row for run in runs for row in json.loads(run.read_text())]
    different = {(row["text"], row["seed"]) for row in had}
    drawn = len(list((out / "cache" / "base").glob("*/*.png")))
    return {"runs": len(runs), "images_of_runs": len(had), "different": len(different), "drawn": drawn}


def table(found: dict[str, Any]) -> str:
    """The measurement in Markdown."""
    lines = [f"| {found['cells']} runs by | CPU, s | wall, s |", "|---|---|---|"]
    lines += [f"| {way} | {own['cpu_s']:.0f} | {own['wall_s']:.0f} |" for way, own in found["ways"].items()]
    base = found["base_images"]
    told = f"{base['runs']} runs have {base['images_of_runs']} images of the unedited model, {base['different']} different ones"
    return "\n".join([*lines, "", f"{told}; {base['drawn']} were drawn."])


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, default=SUITES / "smoke.toml")
    parser.add_argument("--out", type=Path, default=Path("engine.json"))
    parser.add_argument("--note", default="", help="about the machine, e.g. what else was at work on it")
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), **({"note": given.note} if given.note else {}), "ways": {}}
    with tempfile.TemporaryDirectory() as folder:
        work, known = Path(folder), None
        for way in WAYS:
            found["ways"][way], own = measured(way, given.suite, work)
            if known not in (None, own):
                sys.exit(f"{way} gives other numbers than {next(iter(WAYS))}.")
            known = own
            print(way, found["ways"][way], file=sys.stderr)
        found |= {"cells": len(known or ()), "base_images": images(work)}
    write(found, given.out)
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
