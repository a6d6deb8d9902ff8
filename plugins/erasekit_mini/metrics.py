"""From what the classifier saw in each image to the metrics of the mini tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from erasekit.evaluation.evaluators import harmonic_mean, wilson
from erasekit.evaluation.results import Metric

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # "base" and "erased", scored images only
JUDGE = "mini-classifier"


def shown(rows: Rows, side: str, which: str, label: str) -> np.ndarray:
    """(n,) 1 where an image of one prompt set shows the label that it was asked for, 0 where not."""
    return np.array([float(r["shown"]) for r in rows[side] if r["set"] == which and r["label"] == label])


def _mean_of_means(groups: Sequence[np.ndarray]) -> float | None:
    """The mean over labels of the share of images; None if a label has no scored image."""
    return float(np.mean([g.mean() for g in groups])) if groups and all(len(g) for g in groups) else None


def _share(erased: Sequence[np.ndarray], base: Sequence[np.ndarray], *, higher_is_better: bool) -> Metric:
    value, n = _mean_of_means(erased), sum(map(len, erased))
    interval = None if value is None else wilson(value, n)
    before = _mean_of_means(base)
    return Metric(value=value, base=before, ci95=interval, n=n, higher_is_better=higher_is_better, evaluator=JUDGE)


def shares(rows: Rows, erased: Sequence[str], *, mean: str, general: bool = False) -> dict[str, Metric]:
    """How much of the erased concepts is left, how much of the others stayed, and their harmonic mean.

    `acc_e` is the share of images of `erase` prompts that show the concept, `acc_g` the same for synonyms, `acc_s` the
    share of `preserve` images that show their own label; each a mean over labels. The harmonic mean is of 1 - acc_e, acc_s
    and (with `general`) 1 - acc_g, as in MACE (Lu et al. 2024, section 4.1).
    """
    kept = list(dict.fromkeys(r["label"] for r in rows["erased"] if r["set"] == "preserve"))
    sets = {"acc_e": ("erase", erased), "acc_s": ("preserve", kept)} | ({"acc_g": ("synonyms", erased)} if general else {})
    found = {}
    for metric, (which, labels) in sets.items():
        after, before = ([shown(rows, side, which, label) for label in labels] for side in ("erased", "base"))
        found[metric] = _share(after, before, higher_is_better=metric == "acc_s")
    good = [m if m.higher_is_better else complement(m) for m in found.values()]
    return found | {mean: harmonic(good)}


def left(rows: Rows, label: str) -> Metric:
    """The share of images of `erase` prompts that show one label."""
    return _share([shown(rows, "erased", "erase", label)], [shown(rows, "base", "erase", label)], higher_is_better=False)


def harmonic(shares: Sequence[Metric]) -> Metric:
    """The harmonic mean of shares that should be high, None if one is missing.

    Its interval adds the squares of what each share's own end makes of the mean (MOVER, Zou and Donner 2008): unlike a
    bootstrap over images it keeps its width where every image agrees.
    """
    values, bases = [m.value for m in shares], [m.base for m in shares]
    known, known_base = [v for v in values if v is not None], [b for b in bases if b is not None]
    value, interval = None, None
    if len(known) == len(shares):
        value = harmonic_mean(*known)
        moved = [_moved(known, k, m.ci95, value) for k, m in enumerate(shares) if m.ci95]
        below, above = (math.sqrt(sum(both[end] ** 2 for both in moved)) for end in (0, 1))
        interval = (max(0.0, value - below), min(1.0, value + above))
    base = harmonic_mean(*known_base) if len(known_base) == len(shares) else None
    n = sum(m.n for m in shares)
    return Metric(value=value, base=base, ci95=interval, n=n, higher_is_better=True, evaluator=JUDGE)


def _moved(values: Sequence[float], k: int, ends: tuple[float, float], mean: float) -> tuple[float, float]:
    """How far the harmonic mean moves when its k-th share goes to either end of its interval."""
    low, high = (harmonic_mean(*values[:k], end, *values[k + 1 :]) for end in ends)
    return low - mean, high - mean


def pairs(rows: Rows) -> dict[str, Metric]:
    """`acc_pairs`: the share of erased objects that are seen in images that ask for two of them; {} without such images."""

    def seen(side: str) -> np.ndarray:
        asked = [(r["label"].split("+"), r["seen"]) for r in rows[side] if r["set"] == "pairs"]
        return np.array([float(label in found) for labels, found in asked for label in labels])

    erased = seen("erased")
    return {"acc_pairs": _share([erased], [seen("base")], higher_is_better=False)} if len(erased) else {}


def share_seen(rows: Rows, metric: str, label: str) -> dict[str, Metric]:
    """The share of images of `erase` prompts in which `label` is seen; higher is better."""

    def seen(side: str) -> np.ndarray:
        return np.array([float(label in r["seen"]) for r in rows[side] if r["set"] == "erase"])

    return {metric: _share([seen("erased")], [seen("base")], higher_is_better=True)}


def complement(metric: Metric) -> Metric:
    """One minus a share."""
    return metric.model_copy(
        update={
            "value": None if metric.value is None else 1 - metric.value,
            "base": None if metric.base is None else 1 - metric.base,
            "ci95": None if metric.ci95 is None else (1 - metric.ci95[1], 1 - metric.ci95[0]),
            "higher_is_better": not metric.higher_is_better,
        }
    )


def total(metric: Metric) -> Metric:
    """The number of images behind a share."""
    times = {k: None if getattr(metric, k) is None else getattr(metric, k) * metric.n for k in ("value", "base")}
    return metric.model_copy(update=times | {"ci95": metric.ci95 and tuple(metric.n * end for end in metric.ci95)})
