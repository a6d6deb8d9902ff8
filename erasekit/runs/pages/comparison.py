"""The page of several runs: numbers side by side, what is gone against what stayed, cost, and images row by row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erasekit import __version__
from erasekit.erasures.modelcard import NOT_PROMISED
from erasekit.evaluation.curves import Interference
from erasekit.evaluation.interference import interference_of
from erasekit.evaluation.results import RunResult, read_result, read_scores
from erasekit.evaluation.summary import by_protocol, summary
from erasekit.evaluation.tasks import Task
from erasekit.runs.pages import gallery
from erasekit.runs.pages.gallery import Pair
from erasekit.runs.pages.heat import heat_map
from erasekit.runs.pages.images import BUDGET, embedded, is_blurred
from erasekit.runs.pages.layout import write_page
from erasekit.runs.pages.plots import Axis, Chart, Mark, Series
from erasekit.runs.weighed import weighed

LEFT = ("acc_e", "acc_g", "unsafe_images")  # how much of what was erased is still seen, by its name and in other words
STAYED = ("acc_s",)  # how much of the rest is
PREDICTED = {
    "residual": "by predictions: the most that is left of a concept, by its name or in other words",
    "drift": "by predictions: how far what stays has moved",
}
COSTS = {"erase_s": "to erase, s", "file_kb": "file, kB", "peak_memory_mb": "peak memory, MB"}
SAME = ("method", "backbone", "task", "concepts")
ROOM = 1.02  # where an axis of shares ends
NEAR = 0.03  # of a chart: labels of points that are nearer are written together


class Compared(NamedTuple):
    """A run of a comparison.

    Attributes:
        row: its row; runs of one row differ in their concepts and seeds, and are averaged.
        directory: its run directory.
        task: whether its images are blurred.
        result: its numbers.
    """

    row: str
    directory: Path
    task: Task
    result: RunResult


Rows = Mapping[str, Mapping[str, Sequence[tuple[RunResult, Compared]]]]  # of one backbone, task and protocol


def compared(runs: Sequence[tuple[Path, Task]]) -> list[Compared]:
    """Runs with a row for each method, or, where one method did the same twice in two ways, for each configuration.

    Raises:
        UsageError: a directory holds no results.
    """
    found = [Compared("", directory, task, read_result(directory / "results.json")) for directory, task in runs]
    names = row_names([run.result for run in found])
    return [run._replace(row=name) for run, name in zip(found, names, strict=True)]


def row_names(results: Sequence[RunResult]) -> list[str]:
    """The row of each run: its method, with the hash of its configuration where one method did the same in two ways."""
    several = set()
    for one, other in itertools.combinations(results, 2):
        same = all(getattr(one, name) == getattr(other, name) for name in SAME)
        twice = one.seed == other.seed and one.config_hash != other.config_hash
        if same and (twice or one.protocol["hash"] != other.protocol["hash"]):
            several.add(one.method)
    return [f"{r.method} {r.config_hash}" if r.method in several else r.method for r in results]


def write_comparison(runs: Sequence[Compared], path: Path, *, title: str = "", reveal: bool = False) -> Path:
    """Write a page that compares finished runs; those that were not measured alike stand in parts of their own.

    Args:
        runs: the runs.
        path: the page.
        title: its heading; left out, it says what was compared.
        reveal: do not blur images, whatever their task.
    """
    groups: dict[tuple[str, str], dict[str, dict[str, list[tuple[RunResult, Compared]]]]] = {}
    for run in runs:
        rows = groups.setdefault((run.result.backbone, run.result.task), {})
        rows.setdefault(run.row, {}).setdefault("+".join(run.result.concepts), []).append((run.result, run))
    together = [(place, alike) for place, rows in groups.items() for alike in by_protocol(rows)]
    share = len(together)
    parts = [_part(backbone, task, rows, share, reveal=reveal) for (backbone, task), rows in together]
    content = {"parts_of": parts, "title": title or _title(runs), "limits": NOT_PROMISED, "version": __version__}
    return write_page(path, "comparison.html.j2", **content, runs=runs)


def _title(runs: Sequence[Compared]) -> str:
    rows, backbones = (list(dict.fromkeys(names)) for names in zip(*((r.row, r.result.backbone) for r in runs), strict=True))
    return f"{', '.join(rows)} on {' and '.join(backbones)}"


def _part(backbone: str, task: str, rows: Rows, share: int, *, reveal: bool) -> dict[str, Any]:
    """What is measured alike: table, chart, costs and images."""
    found = {name: summary({c: [r for r, _ in runs] for c, runs in concepts.items()}) for name, concepts in rows.items()}
    for name, concepts in rows.items():
        found[name] |= weighed([run.directory / "erasure" for runs in concepts.values() for _, run in runs])
    first = next(iter(next(iter(rows.values())).values()))[0][1]
    metrics = list(dict.fromkeys(name for row in found.values() for name in row["metrics"]))
    best = front({name: at for name, row in found.items() if (at := _place(row["metrics"])) is not None})
    bases: list[Any] = [next(r["metrics"][m]["base"] for r in found.values() if m in r["metrics"]) for m in metrics]
    return {
        "heading": f"{first.task.title or task} on {backbone}",
        "name": f"{task}, {backbone}",
        "concepts": list(dict.fromkeys(c for concepts in rows.values() for c in concepts)),
        "hashes": sorted({r.protocol["hash"] for concepts in rows.values() for runs in concepts.values() for r, _ in runs}),
        "metrics": metrics,
        "predicted": {key: told for key, told in PREDICTED.items() if any(key in row for row in found.values())},
        "meanings": {name: metric.meaning for name, metric in first.result.metrics.items()},
        "rows": found,
        "counts": {name: sum(map(len, concepts.values())) for name, concepts in rows.items()},
        "base": bases,
        "front": best,
        "chart": _chart(found, best),
        "costs": {title: {name: row.get(key, 0.0) for name, row in found.items()} for key, title in COSTS.items()},
        "interference": {name: found for name, concepts in rows.items() if (found := heat_map(interference(concepts)))},
        "images": _images(rows, share, reveal=reveal),
    }


def interference(concepts: Mapping[str, Sequence[tuple[RunResult, Compared]]]) -> Interference | None:
    """What the erasures of one row did to one another's concepts, each at its lowest seed; None of fewer than two."""
    runs = {", ".join(run.result.concepts): run.directory / "scores.parquet" for run in map(_first, concepts.values())}
    found = interference_of({name: read_scores(file) for name, file in runs.items() if file.is_file()})
    return found if len(found.erased) > 1 and found.asked else None


def _metrics(metrics: Mapping[str, Any], names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The metrics of some names, whoever judged them."""
    return [m for name, m in metrics.items() if name.partition("[")[0] in names]


def _left(metrics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How much is still seen, asked for by name or in other words, whichever shows more of it."""
    return max(_metrics(metrics, LEFT), key=lambda m: float(m["mean"]), default=None)


def _stayed(metrics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How much of the rest is still seen."""
    return next(iter(_metrics(metrics, STAYED)), None)


def _place(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """(gone, stayed) of a row, None if it was not measured."""
    left, stayed = _left(metrics), _stayed(metrics)
    return None if left is None or stayed is None else (1 - left["mean"], stayed["mean"])


def front(places: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names on the Pareto front: no other place is as good in both directions and better in one; more is better."""

    def beaten(one: tuple[float, float]) -> bool:
        return any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in places.values())

    return [name for name, place in places.items() if not beaten(place)]


def _chart(rows: Mapping[str, Any], best: Sequence[str]) -> Chart | None:
    """What is gone against what stayed, a point for each row with its intervals, and the Pareto front."""
    marks: dict[str, Mark] = {}
    for name, row in rows.items():
        left, stayed = _left(row["metrics"]), _stayed(row["metrics"])
        if left is not None and stayed is not None:
            ends = (1 - left["ci95"][1], 1 - left["ci95"][0]), (stayed["ci95"][0], stayed["ci95"][1])
            title = f"{name}: {1 - left['mean']:.3f} gone, {stayed['mean']:.3f} stayed"
            marks[name] = Mark(1 - left["mean"], stayed["mean"], *ends, title=title)
    if len(marks) < 2:
        return None
    x = Axis(
        "gone: share of images of the erased without it, in the words that show more of it",
        _floor([m.xs[0] for m in marks.values() if m.xs]),
        ROOM,
    )
    y = Axis("stayed: share of images of the rest that still show it", _floor([m.ys[0] for m in marks.values() if m.ys]), ROOM)
    numbers = {name: i + 1 for i, name in enumerate(rows)}
    series = [Series(name, [mark], "dots", str((numbers[name] - 1) % 6)) for name, mark in marks.items()]
    corners = sorted(((marks[name].x, marks[name].y) for name in best), key=lambda at: (at[0], -at[1]))
    steps = [Mark(x.low, corners[0][1]), *(Mark(*at) for at in corners), Mark(corners[-1][0], y.low)]
    labels = [Mark(*at, label=" ".join(str(numbers[n]) for n in names)) for at, names in _labels(marks, x, y)]
    drawn = [Series("Pareto front", steps, "step", "soft"), *series, Series("", labels, "labels", "soft")]
    return Chart("What is gone against what stayed", drawn, x, y, width=560, height=400, right=40, top=34, legend=False)


def _floor(values: Sequence[float]) -> float:
    """The tenth below the least value, and no more than .9."""
    return min(0.9, max(0.0, int(min(values) * 10) / 10))


def _labels(marks: Mapping[str, Mark], x: Axis, y: Axis) -> list[tuple[tuple[float, float], list[str]]]:
    """Where the labels stand; those of points that lie on one another are one."""
    found: list[tuple[tuple[float, float], list[str]]] = []
    for name, mark in marks.items():
        near = [names for at, names in found if max(abs(x.at(at[0]) - x.at(mark.x)), abs(y.at(at[1]) - y.at(mark.y))) < NEAR]
        if near:
            near[0].append(name)
        else:
            found.append(((mark.x, mark.y), [name]))
    return found


def _images(rows: Rows, share: int, *, reveal: bool) -> dict[str, Any]:
    """Prompts as rows and the rows of the table as columns, all at one seed: where they differ first."""
    concepts = list(dict.fromkeys(c for of_row in rows.values() for c in of_row))
    most = max(1, gallery.MOST_IMAGES // share // (1 + len(rows)) // len(concepts))
    lines, blur = [], False
    for concept in concepts:
        runs = {name: _first(of_row[concept]) for name, of_row in rows.items() if concept in of_row}
        runs = {name: run for name, run in runs.items() if (run.directory / "scores.parquet").is_file()}
        scores = {name: read_scores(run.directory / "scores.parquet") for name, run in runs.items()}
        hide = not reveal and any(is_blurred(run.task, [r["prompt"] for r in scores[name]]) for name, run in runs.items())
        pairs = {name: {_key(pair): pair for pair in gallery.pairs_of(found)} for name, found in scores.items()}
        blur = blur or hide
        lines += [_line(key, pairs, runs, concept, hide=hide) for key in _chosen(pairs, most)]
    files = [(file, line["blur"]) for line in lines for file in line["files"]]
    uris = iter(embedded([file for file, _ in files], blur=[hide for _, hide in files], budget=BUDGET // share))
    for line in lines:
        line["uris"] = [next(uris) for _ in line["files"]]
    return {"columns": list(rows), "lines": lines, "concepts": concepts, "blur": blur}


def _first(runs: Sequence[tuple[RunResult, Compared]]) -> Compared:
    """The run at the lowest seed."""
    return min((run for _, run in runs), key=lambda run: run.result.seed)


def _key(pair: Pair) -> tuple[str, str, int]:
    return pair.base["set"], pair.base["prompt"], pair.base["seed"]


def _chosen(pairs: Mapping[str, Mapping[tuple[str, str, int], Pair]], most: int) -> list[tuple[str, str, int]]:
    """Prompts that all runs drew: first those of which not the same became, then those that failed, prompt sets in turns."""
    common = [key for key in next(iter(pairs.values()), {}) if all(key in of_run for of_run in pairs.values())]

    def rank(key: tuple[str, str, int]) -> tuple[bool, int]:
        outcomes = [of_run[key].outcome for of_run in pairs.values()]
        return len(set(outcomes)) == 1, min(map(gallery.OUTCOMES.index, outcomes))

    sets = list(dict.fromkeys(key[0] for key in common))
    ranked = [sorted((key for key in common if key[0] == name), key=rank) for name in sets]
    return sorted(itertools.islice(gallery.in_turns(ranked), most), key=rank)


def _line(
    key: tuple[str, str, int],
    pairs: Mapping[str, Mapping[tuple[str, str, int], Pair]],
    runs: Mapping[str, Compared],
    concept: str,
    *,
    hide: bool,
) -> dict[str, Any]:
    """One prompt: the base's image, then each run's, and what became of it."""
    own = {name: of_run[key] for name, of_run in pairs.items()}
    base = next(iter(own))
    outcomes = {name: pair.outcome for name, pair in own.items()}
    files = [runs[base].directory / "images" / "base" / own[base].base["file"]]
    files += [runs[name].directory / "images" / "erased" / pair.erased["file"] for name, pair in own.items()]
    return {
        **{"set": key[0], "prompt": key[1], "seed": key[2], "concept": concept, "outcomes": outcomes, "files": files},
        **{"differs": len(set(outcomes.values())) > 1, "blur": hide, "names": list(own)},
    }
