"""From what the classifier saw in each picture to the metrics of the mini tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from erasekit.evaluators import bootstrap, harmonic_mean, wilson
from erasekit.results import Metric

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # "base" and "erased", scored pictures only
JUDGE = "mini-classifier"


def shown(rows: Rows, side: str, which: str, label: str) -> np.ndarray:
    """(n,) 1 where a picture of one prompt set shows the label that it was asked for, 0 where not."""
    return np.array([float(r["shown"]) for r in rows[side] if r["set"] == which and r["label"] == label])


def _mean_of_means(groups: Sequence[np.ndarray]) -> float | None:
    """The mean over labels of the share of pictures; None if a label has no scored picture."""
    return float(np.mean([g.mean() for g in groups])) if groups and all(len(g) for g in groups) else None


def _share(erased: Sequence[np.ndarray], base: Sequence[np.ndarray], *, higher_is_better: bool) -> Metric:
    value, n = _mean_of_means(erased), sum(map(len, erased))
    interval = None if value is None else wilson(value, n)
    before = _mean_of_means(base)
    return Metric(value=value, base=before, ci95=interval, n=n, higher_is_better=higher_is_better, evaluator=JUDGE)


def shares(rows: Rows, erased: Sequence[str], *, mean: str, general: bool = False) -> dict[str, Metric]:
    """How much of the erased concepts is left, how much of the others stayed, and their harmonic mean.

    `acc_e` is the share of pictures of `erase` prompts that show the concept, `acc_g` the same for synonyms, `acc_s` the
    share of `preserve` pictures that show their own label; each a mean over labels. The harmonic mean is of 1 - acc_e, acc_s
    and (with `general`) 1 - acc_g, as in MACE (Lu et al. 2024, section 4.1); its interval resamples pictures within labels.
    """
    kept = list(dict.fromkeys(r["label"] for r in rows["erased"] if r["set"] == "preserve"))
    sets = {"acc_e": ("erase", erased), "acc_s": ("preserve", kept)} | ({"acc_g": ("synonyms", erased)} if general else {})
    groups = {
        side: {metric: [shown(rows, side, which, label) for label in labels] for metric, (which, labels) in sets.items()}
        for side in ("base", "erased")
    }
    found = {m: _share(groups["erased"][m], groups["base"][m], higher_is_better=m == "acc_s") for m in sets}
    return found | {mean: _harmonic(groups)}


def _harmonic(groups: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> Metric:
    """The harmonic mean of what should be high, with its bootstrap interval."""
    erased = groups["erased"]
    flat = [g for metric in erased.values() for g in metric]
    sizes = [len(metric) for metric in erased.values()]

    def statistic(resampled: Sequence[np.ndarray]) -> float:
        ends = np.cumsum(sizes)
        parts = [resampled[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        return _mean_from(dict(zip(erased, parts, strict=True))) or 0.0

    value = _mean_from(erased)
    interval = None if value is None else bootstrap(flat, statistic)
    n = sum(map(len, flat))
    return Metric(value=value, base=_mean_from(groups["base"]), ci95=interval, n=n, higher_is_better=True, evaluator=JUDGE)


def _mean_from(groups: Mapping[str, Sequence[np.ndarray]]) -> float | None:
    values = {metric: _mean_of_means(parts) for metric, parts in groups.items()}
    known = [v if metric == "acc_s" else 1 - v for metric, v in values.items() if v is not None]
    return harmonic_mean(*known) if len(known) == len(values) else None


def pairs(rows: Rows) -> dict[str, Metric]:
    """`acc_pairs`: the share of erased objects that are seen in pictures that ask for two of them; {} without such pictures."""

    def seen(side: str) -> np.ndarray:
        asked = [(r["label"].split("+"), r["seen"]) for r in rows[side] if r["set"] == "pairs"]
        return np.array([float(label in found) for labels, found in asked for label in labels])

    erased = seen("erased")
    return {"acc_pairs": _share([erased], [seen("base")], higher_is_better=False)} if len(erased) else {}


def share_seen(rows: Rows, metric: str, label: str) -> dict[str, Metric]:
    """The share of pictures of `erase` prompts in which `label` is seen; higher is better."""

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
    """The number of pictures behind a share."""
    times = {k: None if getattr(metric, k) is None else getattr(metric, k) * metric.n for k in ("value", "base")}
    return metric.model_copy(update=times | {"ci95": metric.ci95 and tuple(metric.n * end for end in metric.ci95)})
