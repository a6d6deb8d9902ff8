"""The page of one run: its numbers, its images, and all that says how they came about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erasekit import __version__
from erasekit.erasures.certificate import MEANING, content_of
from erasekit.erasures.manifest import read_manifest
from erasekit.erasures.modelcard import NOT_PROMISED, REMOVABLE, load_lines, remains_line
from erasekit.errors import ErasekitError
from erasekit.evaluation.curves import Interference, Strength
from erasekit.evaluation.results import RunResult, read_result, read_scores
from erasekit.evaluation.tasks import Task
from erasekit.runs.offers import taken
from erasekit.runs.pages import gallery, plots, training
from erasekit.runs.pages.attacks import attacks
from erasekit.runs.pages.gallery import Pair, Thing
from erasekit.runs.pages.heat import heat_map
from erasekit.runs.pages.images import embedded, grid, is_blurred
from erasekit.runs.pages.layout import is_share, write_page
from erasekit.runs.pages.plots import Axis, Chart, Mark, Series
from erasekit.runs.records import Environment, read_text, read_whole

TILES = 4
GRID = 12  # pairs of a grid under samples/
MOST_THINGS = 24


def write_report(directory: Path, task: Task, *, reveal: bool = False, meanings: Mapping[str, str] | None = None) -> Path:
    """Write `report.html`, and a grid per prompt set under `samples/`, from the files of a finished run.

    Reads results.json, scores.parquet, the images under images/base and images/erased, and where they exist log.jsonl,
    config.toml, env.json, computed.json, certificate.json, strength.json, interference.json, attacks.json and attacks/,
    samples/step-N.webp and erasure/erasure.json.

    Args:
        directory: the run directory.
        task: its title, and whether its images are blurred; those of a run with sexual prompts are, whatever the task.
        reveal: show them all the same.
        meanings: what the losses of the run's method mean, for the training curves.

    Raises:
        UsageError: the directory holds no results.
    """
    result, rows = read_result(directory / "results.json"), read_scores(directory / "scores.parquet")
    pairs = gallery.pairs_of(rows)
    blur = not reveal and is_blurred(task, [row["prompt"] for row in rows])
    _write_grids(directory, pairs, blur=blur)
    log = training.events(directory / "log.jsonl")
    content = _numbers(result, pairs) | _images(directory, pairs, blur=blur) | _provenance(directory, result)
    content |= {
        "title": task.title or task.name,
        "names": gallery.names(result.concepts),
        "blur": _why(task) if blur else "",
        "curves": training.curves(training.history(log), meanings or {}),
        "film": training.film(directory, log),
        "elsewhere": _elsewhere(directory, result),
        "strength": _strength(Strength.read(directory / "strength.json"), result),
        "attacks": attacks(directory, result, blur=blur),
        "interference": heat_map(Interference.read(directory / "interference.json")),
        "certificate": _certificate(content_of(directory / "certificate.json")),
        "limits": NOT_PROMISED,
        "version": __version__,
    }
    return write_page(directory / "report.html", "report.html.j2", **content)


def _why(task: Task) -> str:
    return "the task is one of what nobody should have to see" if task.blurred else "prompts of the run are sexual"


def _numbers(result: RunResult, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Tiles, the sentence on top, and what became of each thing."""
    shares = {name: m for name, m in result.metrics.items() if is_share(m)}
    found = gallery.things(pairs)
    shown = found[:MOST_THINGS]
    return {
        "result": result,
        "tiles": dict(list(shares.items())[:TILES]),
        "lead": gallery.lead(found, result.concepts),
        "by_thing": _things(shown) if len(found) > 1 else None,
        "things_left": len(found) - len(shown),
    }


def _things(found: Sequence[Thing]) -> Chart:
    count = len(found)
    rows = [(count - i - 0.5, thing) for i, thing in enumerate(found)]
    base = [Mark(t.base, y, title=f"{t.label}, base: {t.base:.2f} of {t.n}") for y, t in rows]
    after = [Mark(t.after, y, xs=_ends(t), title=f"{t.label}, erased: {t.after:.2f} of {t.n}") for y, t in rows]
    labels = [(y, f"{thing.label}{' (erased)' if thing.erased else ''}") for y, thing in rows]
    return Chart(
        "What became of each thing",
        [Series("base", base, "ticks", "base"), Series("erased", after, "dots", "erased")],
        Axis("share of images that show it", 0, 1),
        Axis("", 0, count, names=labels),
        width=520,
        height=60 + 22 * count,
        left=24 + min(150, 7 * max(len(text) for _, text in labels)),
    )


def _ends(thing: Thing) -> tuple[float, float]:
    return min(thing.base, thing.after), max(thing.base, thing.after)


def _images(directory: Path, pairs: Sequence[Pair], *, blur: bool) -> dict[str, Any]:
    """The gallery: at most as many images as a page should hold."""
    some = gallery.chosen(pairs, gallery.MOST_IMAGES // 2)
    files = [_path(directory, row) for pair in some for row in pair]
    uris = embedded(files, blur=[blur] * len(files))
    shown = []
    for rank, pair in enumerate(some):
        base, outcome = pair.base, pair.outcome
        verdicts = [f"{row['side']} {said}" for row in pair if (said := gallery.verdict(row))]
        facts = [outcome.title, f"seed {base['seed']}", f"set {base['set']}", *verdicts]
        shown.append(
            {
                **{key: base[key] for key in ("prompt", "seed", "set", "index")},
                "rank": rank,
                "outcome": outcome,
                "sides": list(zip(("base", "erased"), uris[2 * rank : 2 * rank + 2], strict=True)),
                "verdicts": ", ".join(verdicts),
                "facts": " · ".join([*facts, f"images/erased/{pair.erased['file']}"]),
            }
        )
    outcomes = Counter(pair.outcome for pair in some)
    return {
        "pairs": shown,
        "all_pairs": len(pairs),
        "outcome_counts": sorted(outcomes.items(), key=lambda item: gallery.OUTCOMES.index(item[0])),
        "set_counts": {name: len(own) for name, own in gallery.by_set(some).items()},
    }


def _write_grids(directory: Path, pairs: Sequence[Pair], *, blur: bool) -> None:
    for name, own in gallery.by_set(pairs).items():
        paths = [[_path(directory, row) for row in side] for side in zip(*own[:GRID], strict=True)]
        captions = [pair.base["prompt"] for pair in own[:GRID]]
        grid(paths[0], paths[1], directory / "samples" / f"{name}.png", captions=captions, blur=blur)


def _elsewhere(directory: Path, result: RunResult) -> str:
    """The run that has trained the erasure of this one, if another has."""
    made, settings = taken(directory, result.erasure_sha256), _record(directory / "erasure").get("config", {})
    return made.run if made and settings.get("steps") else ""


def _strength(measured: Strength | None, result: RunResult) -> dict[str, Any]:
    """A chart of all shares together, and one of each other number."""
    if measured is None:
        return {}
    meanings = {name: metric.meaning for name, metric in result.metrics.items()}
    low, high = (f(p.strength for c in measured.curves for p in c.points) for f in (min, max))
    x, charts, together = Axis("strength", low, max(high, low + 1e-6)), [], []
    for i, curve in enumerate(measured.curves):
        marks = [Mark(p.strength, p.value, ys=p.ci95, title=f"{p.strength:g}: {p.value:.3f} (n {p.n})") for p in curve.points]
        series = Series(": ".join(filter(None, [curve.metric, meanings.get(curve.metric)])), marks, "both", str(i % 6))
        ends = [v for mark in marks for v in (mark.y, *(mark.ys or ()))]
        if min(ends) >= 0 and max(ends) <= 1:
            together.append(series)
        else:
            charts.append(Chart(curve.metric, [series], x, Axis(curve.metric, *plots.around(ends)), width=520, height=260))
    if together:
        charts.insert(0, Chart("Strength", together, x, Axis("share of images", 0, 1), width=520, height=280))
    return {"names": gallery.names(measured.concepts), "charts": charts}


def _certificate(content: Mapping[str, Any]) -> dict[str, Any]:
    """A dot for each layer and measure, the layers in numbers, and the drift of predictions."""
    if not content:
        return {}
    sites = content["sites"]
    measures = [key for key in MEANING if any(key in site for site in sites)]
    values = [site[key] for site in sites for key in measures if site.get(key, 0) > 0]
    low, high = (min(values), max(values)) if values else (1e-3, 1.0)
    low, high = min(max(low, 1e-9) * 0.8, 0.1), max(high * 1.25, 1.0)
    series = []
    for i, key in enumerate(measures):
        marks = [Mark(s[key], len(measures) - i - 0.5, title=f"{s['site']}: {s[key]:.2e}") for s in sites if key in s]
        series.append(Series(key, marks, "dots", str(i % 6)))
    columns = [(key, [site.get(key) for site in sites]) for key in measures]
    return {
        "sites": Chart(
            f"{len(sites)} layers that read text, a dot each",
            series,
            Axis("relative to the concept", low, high, log=True),
            Axis("", 0, len(measures), names=[(len(measures) - i - 0.5, key) for i, key in enumerate(measures)]),
            width=520,
            height=60 + 26 * len(measures),
            left=100,
            legend=False,
        ),
        "meanings": {key: MEANING[key] for key in measures},
        "columns": measures,
        "rows": [(site["site"], [site.get(key) for key in measures]) for site in sites],
        "shades": [_shade(own) for _, own in columns],
        "written": lambda value: "-" if value is None else f"{value:.1e}" if value < 1e-2 else f"{value:.3f}",
        "drift": _drift(content.get("prediction_drift", [])),
    }


def _shade(values: Sequence[float | None]) -> Any:
    """How dark a cell of a column is, the largest of its values the darkest."""
    most = max((v for v in values if v is not None), default=0.0)
    return lambda value: plots.level(value, 0.0, most)


def _drift(rows: Sequence[Mapping[str, float]]) -> Chart | None:
    if not rows:
        return None
    kinds = [("clean prompts", "clean", "base"), ("prompts of the concept", "concept", "erased")]
    series = [Series(name, [Mark(r["tau"], r[key]) for r in rows], "line", tone) for name, key, tone in kinds]
    most = max(mark.y for s in series for mark in s.marks) or 1.0
    return Chart(
        "Drift of predictions", series, Axis("tau", 0, 1), Axis("|f' - f| / |f|", 0, most * 1.05), width=520, height=260
    )


def _provenance(directory: Path, result: RunResult) -> dict[str, Any]:
    record, environment = _record(directory / "erasure"), read_whole(Environment, directory / "env.json")
    base, made = record.get("base", {}), taken(directory, result.erasure_sha256)
    rows = {
        "method": result.method,
        "base": " ".join(dict.fromkeys(filter(None, [result.backbone, base.get("repo"), base.get("revision")]))),
        "base, SHA-256 of the touched layers": base.get("sha256"),
        "erasure, SHA-256": result.erasure_sha256,
        "files": ", ".join(record.get("files", ())),
        "made": record.get("created"),
        "computed by": f"run {made.run}, whose seconds of erasing these are" if made else "",
        "task": f"{result.domain}/{result.task}",
        "seed": result.seed,
        "configuration": result.config_hash,
        "protocol": result.protocol["hash"],
        "peak memory": f"{result.peak_memory_mb:.0f} MB",
        "machine": f"{environment.system} {environment.machine}" if environment else "",
    }
    return {
        "provenance": {name: value for name, value in rows.items() if value not in (None, "")},
        "config": read_text(directory / "config.toml"),
        "environment": environment.model_dump(exclude={"schema_version"}) if environment else {},
        "load": load_lines(record) if record else "",
        "removable": REMOVABLE if record.get("kind") == "guidance" else "",
        "remains": remains_line(record) if record else "not measured",
    }


def _path(directory: Path, row: Mapping[str, Any]) -> Path:
    return directory / "images" / str(row["side"]) / str(row["file"])


def _record(folder: Path) -> dict[str, Any]:
    """The manifest of the run's erasure, {} if it is missing or damaged: the numbers of the run stand without it."""
    try:
        return read_manifest(folder)
    except ErasekitError:
        return {}
