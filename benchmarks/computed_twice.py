"""What the runs of a sweep computed, and how much of it twice, out of their logs: after workers or the driver were killed.

    python benchmarks/computed_twice.py benchmarks/suites/table1-mini.toml --out runs --into computed-twice.json

A run that was started again says in its log where it went on. An erasure that it finds, or takes from
another run, is saved as soon as the stage begins; one that it computes has something logged before. A training step or an
image that is logged again was computed twice; what a kill cut short before it was logged (a step, a batch of images) is not
seen here. Images of the unedited model belong to all runs: their files are counted, and those that the runs drew or waited for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine import cells
from erasekit.runs.records import read_log
from record import write

EVENTS = ("RunStarted", "StageStarted", "Progressed", "Watched", "StepEnd", "Saved", "Sampled")


def starts(log: Path) -> Iterator[list[dict[str, Any]]]:
    """The events of a run, start by start."""
    own: list[dict[str, Any]] = []
    for event in read_log(log, only=EVENTS):
        if event["event"] == "RunStarted" and own:
            yield own
            own = []
        own.append(event)
    yield own


def drawn(events: list[dict[str, Any]], which: str) -> int:
    """Images that came to be there during a start; the first event says how many there were."""
    done = [event["done"] for event in events if event["event"] == "Sampled" and event["which"] == which]
    return done[-1] - done[0] if done else 0


def computed(events: list[dict[str, Any]]) -> bool:
    """Whether an erasure was made in a start, and not found."""
    saved = [i for i, event in enumerate(events) if event["event"] == "Saved"]
    return bool(saved) and events[saved[0] - 1]["event"] != "StageStarted"


def again(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> int:
    """Training steps that a start did once more; a training that was done is followed by the next one's first step."""
    if not before or not now or before[-1]["step"] == before[-1]["total"]:
        return 0
    return max(0, before[-1]["step"] - now[0]["step"] + 1)


def of_run(folder: Path) -> Counter[str]:
    """What one run computed."""
    found: Counter[str] = Counter(runs=1)
    before: list[dict[str, Any]] = []
    for events in starts(folder / "log.jsonl"):
        now = [event for event in events if event["event"] == "StepEnd"]
        found["starts"] += 1
        found["erasures"] += computed(events)
        found["training_steps"] += len(now)
        found["training_steps_again"] += again(before, now)
        before = now or before
        for which in ("erased", "base"):
            found[f"{which}_images"] += drawn(events, which)
    indexes = {which: json.loads((folder / "images" / which / "index.json").read_text()) for which in ("erased", "base")}
    found["erased_images_again"] = found["erased_images"] - len({(row["text"], row["seed"]) for row in indexes["erased"]})
    found["base_images_of_runs"] = len(indexes["base"])
    return found


def main() -> None:
    """Count, write, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the folder of the runs")
    parser.add_argument("--into", type=Path, default=Path("computed-twice.json"))
    given = parser.parse_args()
    runs = [given.out / cell["path"] for cell in cells(given.suite, given.out) if cell["state"] == "finished"]
    found: Counter[str] = Counter()
    for run in runs:
        found.update(of_run(run))
    found["base_image_files"] = len(list((given.out / "cache" / "base").glob("*/*.png")))
    write(found, given.into)
    sys.stdout.write("\n".join(f"{name}: {count}" for name, count in found.items()) + "\n")


if __name__ == "__main__":
    main()
