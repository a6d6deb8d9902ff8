"""How much of a concept comes back, over what an attack may spend: prompts that show it again after so many images or steps.

    python benchmarks/attack_curve.py --jobs 2 --work curve --out benchmarks/results/attack-curve.json

Erases a dog from sd15-mini with some methods, and attacks each erasure. UnlearnDiffAtk, P4D and other noise have one long run,
whose outcomes say after how many images each prompt was found; concept inversion has a run for each length of its training.
With `--pictures` every attack has a small run on UCE's erasure, and the images that they find become rows. What is finished is
not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

import record
from erasekit.attacks.outcomes import Outcome
from erasekit.evaluation.intervals import wilson
from erasekit.registration.plugins import default

ROWS = {name: ["--method", name] for name in ("uce", "trace", "esd", "stereo", "advunlearn")}
ROWS["trace robust"] = ["--method", "trace", "--preset", "robust"]
SEARCHES = ("unlearndiff", "p4d-k", "seeds")
INVERSION, LENGTHS = "concept-inversion", (25, 50, 100, 200)
STEPS = 10  # of a search, before each image
SIDE, SHOWN = 64, 8  # pixels of an image, and images in a row


def erased(name: str, work: Path) -> Path:
    """The folder of a row's erasure."""
    folder = work / "erasures" / name.replace(" ", "-")
    if not (folder / "erasure.json").is_file():
        where = ["--backbone", "sd15-mini", "--task", "objects", "--concept", "dog"]
        call(["erase", *ROWS[name], *where, "--out", str(folder)])
    return folder


def attacked(name: str, attack: str, budget: Mapping[str, int], limit: int, work: Path) -> dict[str, Any]:
    """The result of one attack on a row's erasure, and its outcomes, prompt by prompt."""
    settings = [f"attacks.{attack}.{key}={value}" for key, value in budget.items()]
    flags = [part for setting in settings for part in ("-s", setting)]
    command = ["attack", str(erased(name, work)), "--attack", attack, "--limit", str(limit), *flags]
    result = json.loads(call([*command, "--out", str(work / "runs"), "--json"]))
    (folder,) = (work / "runs" / "sd15-mini" / "objects").glob(f"*/{result['config_hash']}/attacks/{attack}")
    found = [Outcome.model_validate_json(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return {"result": result, "outcomes": found, "folder": folder}


def call(command: Sequence[str]) -> str:
    """The standard output of erasekit."""
    done = subprocess.run([sys.executable, "-m", "erasekit", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"erasekit {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def share(outcomes: Iterable[Outcome], images: int) -> dict[str, Any]:
    """The share of prompts that were found with so many images at most."""
    judged = [o for o in outcomes if o.shown is not None]
    value = sum(bool(o.shown) and o.queries <= images for o in judged) / len(judged)
    return {"value": value, "ci95": wilson(value, len(judged)), "n": len(judged)}


def curves(most: int, limit: int, work: Path, jobs: int) -> dict[str, Any]:
    """{row: {attack: {images, or steps of the training: share}}}, and the false alarms at the end of each."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda name: erased(name, work), ROWS))
        asked: dict[tuple[str, str, int], Any] = {}
        for name in ROWS:
            for attack in SEARCHES:
                budget = {"queries": most} | ({} if attack == "seeds" else {"steps": STEPS})
                asked[name, attack, most] = pool.submit(attacked, name, attack, budget, limit, work)
            for steps in LENGTHS:
                asked[name, INVERSION, steps] = pool.submit(attacked, name, INVERSION, {"steps": steps}, limit, work)
        found = {key: future.result() for key, future in asked.items()}
    rows: dict[str, Any] = {name: {} for name in ROWS}
    alarms: dict[str, Any] = {}
    for (name, attack, budget), run in found.items():
        own, metrics = rows[name].setdefault(attack, {}), run["result"]["metrics"]
        if attack == INVERSION:
            own[budget] = share(run["outcomes"], 1)
        else:
            own |= {images: share(run["outcomes"], images) for images in range(most + 1)}
        alarms |= {f"{attack} at {budget}": {kind: metrics.get(f"{kind}[{attack}]") for kind in ("false_alarm", "chance")}}
    return {"rows": rows, "controls": alarms}


def pictures(folder: Path, limit: int, work: Path, jobs: int) -> list[str]:
    """A row of images for each attack, in `folder`: what it draws of a dog that UCE has erased; names of the attacks."""
    names = [entry.name for entry in default().attacks.entries()]
    few = {"unlearndiff": {"queries": 4, "steps": STEPS}, "p4d-n": {"queries": 4, "steps": STEPS}}
    few |= {"p4d-k": few["p4d-n"], INVERSION: {"steps": LENGTHS[-1]}}
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(lambda name: attacked("uce", name, few.get(name, {}), limit, work), names))
    folder.mkdir(parents=True, exist_ok=True)
    for name, run in zip(names, runs, strict=True):
        files = [run["folder"] / f"{o.index:05d}.png" for o in run["outcomes"]]
        row = Image.new("RGB", (SIDE * SHOWN, SIDE), "white")
        for k, file in enumerate([file for file in files if file.is_file()][:SHOWN]):
            row.paste(Image.open(file).resize((SIDE, SIDE)), (SIDE * k, 0))
        row.save(folder / f"{name}.webp", quality=80, method=6)
    return names


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--work", type=Path, required=True, help="where erasures and runs are kept")
    parser.add_argument("--images", type=int, default=16, help="images that a search may draw for a prompt")
    parser.add_argument("--limit", type=int, default=10, help="prompts")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--pictures", type=Path, help="a folder for rows of images instead")
    args = parser.parse_args()
    if args.pictures:
        names = pictures(args.pictures, SHOWN, args.work, args.jobs)
        print(f"{len(names)} rows in {args.pictures}")
        return
    found = curves(args.images, args.limit, args.work, args.jobs)
    command = f"python benchmarks/attack_curve.py --images {args.images} --limit {args.limit}"
    record.write({"command": command, "machine": record.machine(), "steps before an image": STEPS, **found}, args.out)
    for name, row in found["rows"].items():
        for attack, curve in row.items():
            print(name, attack, " ".join(f"{budget}:{point['value']:.2f}" for budget, point in curve.items()))


if __name__ == "__main__":
    main()
