"""What TRACE's theory promises of an erasure, measured: Thm 3.1 and Prop. 3.2 per site, Thm 3.3 and Cor. 3.4 per tau."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from erasekit.backbones.alignment import align
from erasekit.backbones.protocol import Backbone, Conditioning
from erasekit.backbones.sampler import follow
from erasekit.concepts import Concept
from erasekit.documents import Damaged, read_document
from erasekit.erasures.deltas import Deltas, merged, norm, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.evaluation.tasks import Protocol, Task
from erasekit.events import progress

MEANING = {
    "to_neutral": "|W'e_w - W e_u|, the concept read as the neutral word was (Thm 3.1)",
    "equal": "|W'e_w - W'e_u|, the concept read as the neutral word is (Prop. 3.2)",
    "neutral_drift": "|W'e_u - W e_u|, drift of the neutral word (Prop. 3.2)",
    "other_drift": "|W'e_o - W e_o|, drift of the tokens of clean prompts",
    "delta": "|Delta| / |W|",
    "drift_words": "other_drift at words, and at the begin token",
    "drift_end": "other_drift at the end token",
    "drift_pads": "other_drift at what fills a prompt up",
}
PER_POSITION = ("drift_words", "drift_end", "drift_pads")  # of sites that read tokens


class Certificate(BaseModel):
    """The content of certificate.json: see `certificate`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1]
    max: dict[str, float]
    mean: dict[str, float]
    sites: list[dict[str, str | float]]
    prediction_drift: list[dict[str, float]] = Field(default_factory=list)
    early_drift: dict[str, float] = Field(default_factory=dict)


def content_of(path: Path) -> dict[str, Any]:
    """The content of certificate.json, {} if it is missing or damaged: it can be made again."""
    try:
        found = read_document(Certificate, path).model_dump(exclude_unset=True)
    except (OSError, Damaged):
        return {}
    whole = all(isinstance(site.get("site"), str) and MEANING.keys() & site.keys() for site in found["sites"])
    return found if whole and found["max"] else {}


@torch.no_grad()
def certificate(
    backbone: Backbone,
    erasure: Erasure,
    concepts: Sequence[Concept],
    clean_prompts: Sequence[str],
    *,
    protocol: Protocol,
    tau0: float = 0.15,
    drift: bool = False,
) -> dict[str, Any]:
    """Measure an erasure's weights against those of a loaded base and, if asked for, how far its predictions drift.

    e_w are the embeddings of a concept's prompts from where they differ from the neutral ones to the last pad, e_u those
    of the neutral prompts (`alignment.align`), e_o all those of the clean prompts. Errors of a site are root mean
    squares relative to that of |W (e_w - e_u)|, so that 1 is as large as the concept itself.

    Args:
        backbone: the base, without adapters.
        erasure: what is measured; all of its parts at once.
        concepts: whose prompts and neutral prompts are used.
        clean_prompts: prompts that must not change.
        protocol: steps, size and (where the model is told one) guidance of the trajectories that predictions are compared on.
        tau0: what counts as early.
        drift: compare predictions too, which takes four passes of up to as many rows as clean prompts at every step.

    Returns:
        `schema_version`, 1; `max`, `mean`: over the sites of `to_neutral` |W'e_w - W e_u|, `equal` |W'e_w - W'e_u|,
        `neutral_drift` |W'e_u - W e_u|, `other_drift` |W'e_o - W e_o| and `delta` |Delta| / |W|; over those that read tokens,
        the drift of e_o by position: `drift_words` (and the begin token), `drift_end` (the end token), `drift_pads` (left out
        where no prompt has any);
        `sites`: [{"site", ...}], the same for each site; and with `drift`
        `prediction_drift`: [{"tau", "clean", "concept"}], |f' - f| / |f| at every step;
        `early_drift`: {"tau0", "clean", "concept"}, the mean of those with tau < tau0 (with `LateGate` it is 0).
    """
    deltas = erasure.total()
    concept = backbone.encode([p for c in concepts for p in c.prompts()])
    neutral = backbone.encode([c.neutralise(p) for c in concepts for p in c.prompts()])
    clean = backbone.encode(list(clean_prompts))
    sites = _sites(backbone, deltas, concept=concept, neutral=neutral, clean=clean)
    keys = [key for key in MEANING if any(key in row for row in sites.values())]
    over_sites = {key: [row[key] for row in sites.values() if key in row] for key in keys}
    content: dict[str, Any] = {
        "schema_version": 1,
        "max": {key: max(values) for key, values in over_sites.items()},
        "mean": {key: _mean(values) for key, values in over_sites.items()},
        "sites": [{"site": name} | row for name, row in sites.items()],
    }
    if drift:
        some = concept[:: -(-len(concept) // len(clean))]  # as many as there are clean ones, spread over concepts and phrases
        content |= _drift(backbone, deltas, {"clean": clean, "concept": some}, protocol, tau0)
    return content


def certify(
    backbone: Backbone, erasure: Erasure, task: Task, protocol: Protocol, *, prompts: int = 12, drift: bool = False
) -> dict[str, Any]:
    """The certificate of an erasure on the clean evaluation prompts of a task, at most `prompts` of them."""
    clean = _clean(erasure.concepts, task, prompts)
    return certificate(backbone, erasure, erasure.concepts, clean, protocol=protocol, drift=drift)


def texts(concepts: Sequence[Concept], task: Task, *, prompts: int = 12) -> list[str]:
    """The prompts that `certify` asks for."""
    own = [p for c in concepts for p in c.prompts()]
    return [*own, *(c.neutralise(p) for c in concepts for p in c.prompts()), *_clean(concepts, task, prompts)]


def _clean(concepts: Sequence[Concept], task: Task, n: int) -> list[str]:
    """At most `n` clean prompts of a task; of one that has none the empty prompt, which may not change either."""
    return [p.text for p in task.prompts("clean", concepts, "evaluation", n)] or [""]


def _sites(
    backbone: Backbone, deltas: Deltas, *, concept: Conditioning, neutral: Conditioning, clean: Conditioning
) -> dict[str, dict[str, float]]:
    """Errors of every site that reads text, in float64."""
    embeddings = {}
    for reads in {site.reads for site in backbone.text_sites()}:
        pairs = align(concept, neutral) if reads == "tokens" else (_pooled(concept), _pooled(neutral))
        others = clean.tokens.flatten(0, 1).double() if reads == "tokens" else _pooled(clean)
        embeddings[reads] = (*pairs, others)
    result = {}
    for site in backbone.text_sites():
        w_ND, u_ND, o_MD = embeddings[site.reads]
        weight = backbone.weight(site.name).cpu().double()
        delta = deltas.get(site.name)
        change = torch.zeros_like(weight) if delta is None else to_dense(delta).to(weight)
        reach = _rms((w_ND - u_ND) @ weight.T)
        positions = _positions(clean) if site.reads == "tokens" else {}
        result[site.name] = {
            "to_neutral": _rms((w_ND - u_ND) @ weight.T + w_ND @ change.T) / reach,
            "equal": _rms((w_ND - u_ND) @ (weight + change).T) / reach,
            "neutral_drift": _rms(u_ND @ change.T) / reach,
            "other_drift": _rms(o_MD @ change.T) / reach,
            "delta": 0.0 if delta is None else norm(delta) / float(weight.norm()),
            **{key: _rms(o_MD[at_M] @ change.T) / reach for key, at_M in positions.items()},
        }
    return result


def _positions(cond: Conditioning) -> dict[str, torch.Tensor]:
    """Which of all positions of prompts, one prompt after the other, are words, end tokens and pads."""
    behind = torch.cat([torch.arange(read.ids.shape[1]) - read.lengths[:, None] + 1 for read in cond.readings()], 1)
    masks = zip(PER_POSITION, (behind < 0, behind == 0, behind > 0), strict=True)
    return {key: mask.flatten().to(cond.tokens.device) for key, mask in masks if mask.any()}


def _drift(
    backbone: Backbone, deltas: Deltas, conds: Mapping[str, Conditioning], protocol: Protocol, tau0: float
) -> dict[str, Any]:
    """`prediction_drift` and `early_drift` of named prompts."""
    schedule = backbone.schedule(protocol.steps, protocol.size)
    tau, first = schedule.tau, schedule.first_late(tau0)
    found = {name: _prediction_drift(backbone, deltas, cond, protocol) for name, cond in conds.items()}
    return {
        "prediction_drift": [{"tau": t} | {name: d[k] for name, d in found.items()} for k, t in enumerate(tau.tolist())],
        "early_drift": {"tau0": tau0} | {name: _mean(d[:first]) for name, d in found.items()},
    }


def _prediction_drift(backbone: Backbone, deltas: Deltas, cond: Conditioning, protocol: Protocol) -> list[float]:
    """|f' - f| / |f| at every step of the base's own trajectories under `cond` (seeds 0, 1, ...)."""
    points: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def predict(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return backbone.predict(x, tau, cond, guidance=protocol.guidance)

    def direction(x: torch.Tensor, tau: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        points.append((x, tau, predict(x, tau)))
        return points[-1][2]

    n, drift = len(cond), []
    follow(backbone, range(n), direction, steps=protocol.steps, size=protocol.size, batch=n, what="predictions")
    with merged(backbone.denoiser, deltas):
        for k, (x, tau, base) in enumerate(points):
            progress("predictions", k, len(points))
            drift.append(_rms(predict(x, tau) - base) / _rms(base))
    progress("predictions", len(points), len(points))
    return drift


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _rms(rows: torch.Tensor) -> float:
    return float(rows.double().square().mean().sqrt())


def _pooled(cond: Conditioning) -> torch.Tensor:
    if cond.pooled is None:
        raise ValueError("A site reads a pooled embedding that this backbone does not give.")
    return cond.pooled.double()
