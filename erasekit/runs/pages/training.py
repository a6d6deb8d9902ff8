"""What a run's log says of its training: curves of the losses, and the images that were drawn on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erasekit.runs.pages.images import BUDGET, embedded
from erasekit.runs.pages.plots import Axis, Chart, Mark, Series
from erasekit.runs.records import read_log

MOST_POINTS = 300  # of a line
FRAMES = 12  # of the images drawn on the way
LOG_RANGE = 30.0  # a loss that falls by more than this factor is drawn on a logarithmic axis


class Curve(NamedTuple):
    """A loss over the steps: its name, what it means, and its chart."""

    name: str
    meaning: str
    chart: Chart


def events(path: Path) -> list[dict[str, Any]]:
    """The events in log.jsonl."""
    return list(read_log(path))


def history(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """The values of every training step in order, one training after the other.

    Steps that a run did again from its checkpoint, after it had been killed, count once.
    """
    trainings: list[dict[int, Mapping[str, float]]] = []
    last, total = 0, 0
    again = False  # the next step may be one that an earlier attempt did
    for event in log:
        if event.get("event") == "RunStarted":
            again = True
        if event.get("event") != "StepEnd":
            continue
        step = event["step"]
        goes_on = step > last or (again and last < total)
        if not trainings or not goes_on:
            trainings.append({})
        trainings[-1] = {k: v for k, v in trainings[-1].items() if k < step} | {step: event["values"]}
        last, total, again = step, event["total"], False
    return [values for steps in trainings for values in steps.values()]


def curves(steps: Sequence[Mapping[str, float]], meanings: Mapping[str, str]) -> list[Curve]:
    """A chart of each logged value over the training steps; none of a value that is always 0.

    Args:
        steps: the values of each step, in order.
        meanings: what they mean, by the name before any slash.
    """
    found = []
    for name in dict.fromkeys(key for values in steps for key in values):
        points = [(i + 1.0, values[name]) for i, values in enumerate(steps) if name in values]
        smooth = smoothed([y for _, y in points])
        if len(points) > 1 and any(smooth):
            meaning = meanings.get(name.partition("/")[0], "")
            found.append(Curve(name, meaning, _chart(name, points, smooth)))
    return found


def _chart(name: str, points: Sequence[tuple[float, float]], smooth: Sequence[float]) -> Chart:
    every = -(-len(points) // MOST_POINTS)
    single = [Mark(x, y) for x, y in points[::every]]
    mean = [Mark(x, y) for (x, _), y in zip(points[::every], smooth[::every], strict=True)]
    values = [*(m.y for m in single), *smooth]
    log = min(values) > 0 and max(smooth) > LOG_RANGE * min(smooth)
    low = min(values) if log else min(0.0, *values)
    y = Axis("logarithmic" if log else "", low, max(values), log=log)
    x = Axis("step", 1, points[-1][0])
    return Chart(name, [Series("", single, "faint"), Series("running mean", mean)], x, y)


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean that forgets over about ten steps."""
    found: list[float] = []
    for value in values:
        found.append(value if not found else found[-1] + 0.15 * (value - found[-1]))
    return found


class Frame(NamedTuple):
    """Images drawn after a training step."""

    step: int
    uri: str
    prompts: str


def film(directory: Path, log: Sequence[Mapping[str, Any]]) -> list[Frame]:
    """The images that were drawn while a run trained, at most `FRAMES` of them, the first and the last among them."""
    drawn = {e["step"]: e for e in log if e.get("event") == "Watched" and (directory / "samples" / e["file"]).is_file()}
    steps = sorted(drawn)
    if len(steps) > FRAMES:
        steps = [steps[round(i * (len(steps) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    paths = [directory / "samples" / drawn[step]["file"] for step in steps]
    uris = embedded(paths, blur=[False] * len(paths), budget=BUDGET // 10)  # those of blurred runs were blurred when drawn
    return [Frame(step, uri, ", ".join(drawn[step]["prompts"])) for step, uri in zip(steps, uris, strict=True) if uri]
