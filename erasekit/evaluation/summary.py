"""One row of a table from many runs: means over concepts and seeds, with intervals, and differences from another row.

The images of a concept have the same prompts and noise at every seed, so that seeds are no further sample of them: concepts
are what is resampled, each with the mean of its seeds. Seeds of a method that has no use for one, as closed forms have none,
give one erasure, and count as one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from erasekit.evaluation.results import ATTACKS_HASH, Metric, RunResult

RESAMPLES = 2000
Runs = Mapping[str, Sequence[RunResult]]  # by concept (or concepts that were erased together), one for each seed


def interval(concepts: Sequence[Sequence[Metric]]) -> list[float]:
    """A 95 % interval of the mean over concepts, each with its runs at several seeds.

    The wider one of a bootstrap over concepts and of the mean of the concepts' own intervals (MOVER, Zou and Donner 2008),
    where a concept has the mean value and the mean interval of its runs: concepts that all agree are no proof that the next
    one would.
    """
    values = [[m.value for m in runs if m.value is not None] for runs in concepts]
    ends = [[m.ci95 for m in runs if m.ci95] for runs in concepts]
    known = all(len(e) == len(v) for e, v in zip(ends, values, strict=True))
    return _interval([float(np.mean(v)) for v in values], [np.mean(e, 0).tolist() for e in ends] if known else None)


def _interval(values: Sequence[float], ends: Sequence[Sequence[float]] | None) -> list[float]:
    """The interval of a mean of independent values, each with its own interval if `ends` are given."""
    each = np.array(values)
    draws = np.random.default_rng(0).choice(each, (RESAMPLES, len(each)))
    low, high = np.percentile(draws.mean(1), (2.5, 97.5))
    if ends is not None:
        below, above = np.sqrt(np.square(np.array(ends) - each[:, None]).sum(0)) / len(each)
        low, high = min(low, each.mean() - below), max(high, each.mean() + above)
    return [round(float(low), 4), round(float(high), 4)]


def distinct(runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs of one concept without those that gave the same erasure: of a closed form all seeds are one run."""
    return list({run.erasure_sha256: run for run in runs}.values())


def summary(runs: Runs) -> dict[str, Any]:
    """Of every metric that all runs have the mean over concepts, each with its seeds; the time to erase and the memory.

    Seeds that gave the same erasure count once, in `runs` and `images` too.
    """
    every = [run for of_concept in runs.values() for run in of_concept]
    concepts = [distinct(of_concept) for of_concept in runs.values()]
    metrics = {}
    for name in _common(every):
        known = [[m for run in of_concept if (m := run.metrics[name]).value is not None] for of_concept in concepts]
        known = [of_concept for of_concept in known if of_concept]
        if known:
            metrics[name] = _mean(known)
    seconds, peak = [run.timings_s.get("erase", 0.0) for run in every], max(run.peak_memory_mb for run in every)
    return {"metrics": metrics, "erase_s": round(float(np.median(seconds)), 2), "peak_memory_mb": peak}


def by_protocol(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows in groups whose concepts were measured alike, and attacked with one budget if they were attacked.

    A row that has runs of several protocols stands in several groups, each time with the runs of one.

    Args:
        rows: {row: {concept: [(result, anything), ...]}}.
    """
    groups: list[tuple[dict[tuple[str, str], str], dict[str, Any]]] = []
    for name, concepts in rows.items():
        left = dict(concepts)
        while left:
            protocols = {concept: _protocol(runs[0]) for concept, runs in left.items()}
            hashes = {(c, key): value for c, protocol in protocols.items() for key, value in protocol.items()}
            group = next((g for g in groups if name not in g[1] and all(g[0].get(c, h) == h for c, h in hashes.items())), None)
            if group is None:
                groups.append(group := ({}, {}))
            group[0].update(hashes)
            group[1][name] = {c: [run for run in runs if _protocol(run) == protocols[c]] for c, runs in left.items()}
            others = {c: [run for run in runs if _protocol(run) != protocols[c]] for c, runs in left.items()}
            left = {concept: runs for concept, runs in others.items() if runs}
    return [members for _, members in groups]


def _protocol(run: Any) -> dict[str, str]:
    """The hashes of how a run was measured and attacked."""
    return {key: str(run[0].protocol[key]) for key in ("hash", ATTACKS_HASH) if key in run[0].protocol}


def _common(runs: Sequence[RunResult]) -> list[str]:
    return [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]


def _mean(concepts: Sequence[Sequence[Metric]]) -> dict[str, Any]:
    """A metric's mean over concepts, with its interval, the unedited model's, and what it rests on."""
    bases = [m.base for runs in concepts for m in runs if m.base is not None]
    complete = len(bases) == sum(map(len, concepts))
    return {
        "mean": round(float(np.mean([np.mean([m.value for m in runs]) for runs in concepts])), 4),
        "ci95": interval(concepts),
        "base": round(float(np.mean(bases)), 4) if complete else None,
        "higher_is_better": concepts[0][0].higher_is_better,
        "runs": sum(map(len, concepts)),
        "images": sum(m.n for runs in concepts for m in runs),
    }


def differences(runs: Runs, reference: Runs) -> dict[str, Any]:
    """Of every metric the mean difference from another row's, over the concepts and seeds that both have.

    Both rows draw the same prompts with the same seeds, so that what is common to both falls out. The interval is a bootstrap
    over concepts, each with the mean difference of its seeds; of one concept alone there is none.
    """
    pairs = {name: _paired(runs[name], reference[name]) for name in runs.keys() & reference.keys()}
    pairs = {name: pairs[name] for name in runs if pairs.get(name)}
    every = [run for of_concept in pairs.values() for pair in of_concept for run in pair]
    found = {}
    for metric in _common(every) if every else []:
        each = [[_less(one.metrics[metric], other.metrics[metric]) for one, other in pairs[name]] for name in pairs]
        means = [float(np.mean(known)) for of_concept in each if (known := [d for d in of_concept if d is not None])]
        if means:
            ends = _interval(means, None) if len(means) > 1 else None
            found[metric] = {"mean": round(float(np.mean(means)), 4), "ci95": ends, "concepts": len(means)}
    return found


def _paired(runs: Sequence[RunResult], reference: Sequence[RunResult]) -> list[tuple[RunResult, RunResult]]:
    """Runs of equal seeds and protocols; a single run, as closed forms have, beside each run of the other row."""
    single = 1 in (len(runs), len(reference))
    together = [(one, other) for one in runs for other in reference if one.protocol["hash"] == other.protocol["hash"]]
    return [(one, other) for one, other in together if single or one.seed == other.seed]


def _less(one: Metric, other: Metric) -> float | None:
    return None if one.value is None or other.value is None else one.value - other.value
