"""RECE (ECCV 2024): after a closed-form edit, find the embeddings that still bring the concept back, and edit those too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field

from erasekit.closedform import RidgeUnit, TextEdit, uce
from erasekit.deltas import Deltas, concatenate, to_dense
from erasekit.erasure import Erasure
from erasekit.method import Method, MethodConfig, RunContext
from erasekit.sites import SiteEmbeddings, Tokens, guided_texts, site_deltas, site_embeddings, site_weights
from erasekit_rece.solve import adversary


class Rounds(MethodConfig):
    """Settings of the rounds, whatever edit they follow."""

    tokens: Tokens = Field("all", description="edited positions: the concept's last token, the suffix from there, or all")
    guides: tuple[str, ...] = Field((), description="what the concept becomes instead of its neutral words")
    ridge_unit: RidgeUnit = Field(
        "relative", description="of all ridges: relative to the mean of the system's diagonal, or absolute as published"
    )
    rounds: int = Field(1, ge=0, description="how often adversarial embeddings are found and edited")
    adversary_ridge: float = Field(1e-2, gt=0, description="how small adversarial embeddings are held")
    round_ridge: float = Field(1e-3, gt=0, description="lambda of the edits against them")
    round_preserve_scale: float = Field(1.0, ge=0, description="weight of the preserved embeddings in those edits")
    hold: bool = Field(True, description="hold what earlier edits made of the concepts; the published rounds let it go")


class ReceConfig(Rounds):
    """Settings of RECE; those of the first edit are UCE's."""

    ridge: float = Field(1e-3, gt=0, description="lambda of the first edit")
    preserve_scale: float = Field(1.0, ge=0, description="weight of the preserved embeddings in the first edit")


class Rece(Method):
    """RECE (arXiv:2407.12383) for any number of concepts at once.

    Where the published code asks a detector after each round whether to go on, the number of rounds is a setting here. The
    official preset is that for objects; for nudity it is 3 rounds, for styles and hard objects an `adversary_ridge` of 1e-3.
    """

    name = "rece"
    version = 2  # several guides: what is held counts each as its share
    Config = ReceConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {
            "guides": [""],
            "ridge_unit": "absolute",
            "ridge": 0.5,
            "rounds": 1,
            "adversary_ridge": 0.1,
            "round_ridge": 0.1,
            "round_preserve_scale": 0.1,
            "hold": False,
        },
    }
    config: ReceConfig

    def texts(self, ctx: RunContext) -> list[str]:
        """Also what the guides make of the concepts' prompts."""
        return [*super().texts(ctx), *guided_texts(ctx, self.config.guides)]

    def erase(self, ctx: RunContext) -> Erasure:
        """UCE's edit, then the rounds."""
        config, weights = self.config, site_weights(ctx.backbone)
        shares = {}
        for reads, e in site_embeddings(ctx, tokens=config.tokens, guides=config.guides).items():
            preserve_MD = e.preserve_MD * config.preserve_scale**0.5
            shares[reads] = _shares(e, torch.cat(e.concepts), preserve_MD, config, ridge=config.ridge)
        deltas = robustify(ctx, site_deltas(ctx, shares, weights), config)
        parts = {name: {"edit": own} for name, own in deltas.items()}
        return Erasure.of(ctx, method=self.name, config=config.model_dump(), deltas=parts)


def robustify(ctx: RunContext, deltas: Mapping[str, Deltas], config: BaseModel) -> dict[str, Deltas]:
    """RECE's rounds after any edit that reaches the text sites: the component `rece` of the slot `robustify`.

    In each round the adversarial embeddings c' of all concepts are found on the weights W' that all deltas together give,
    and one joint UCE edit of W' sends them to what W' makes of the neutral embeddings. Unless that edit also holds what W'
    makes of the concepts, of their neutral embeddings and of the c' of earlier rounds, it takes most of the erasure back
    (`Rounds.hold`).

    Args:
        ctx: the run.
        deltas: {concept: deltas of the base weights}. Further names, e.g. of an adapter that concepts share, count for W'
            and stay as they are; so do deltas of other layers.
        config: the settings of the method that calls. Those that `Rounds` has too are used, its defaults for the others.

    Returns:
        The deltas of the base weights with the rounds' added, which has each concept's share: a sum of low-rank ones
        stays low-rank.
    """
    settings = Rounds(**{name: getattr(config, name) for name in Rounds.model_fields if hasattr(config, name)})
    embeddings = site_embeddings(ctx, tokens=settings.tokens, guides=settings.guides)
    base, total = site_weights(ctx.backbone), dict(deltas)
    kept = {reads: [e.preserve_MD * settings.round_preserve_scale**0.5] for reads, e in embeddings.items()}
    for reads, e in embeddings.items() if settings.hold else ():
        kept[reads] += [*e.concepts, *e.goals]
    for k in range(settings.rounds):
        edited, shares = _edited(base, total), {}
        left = whole = 0.0
        for reads, e in embeddings.items():
            names = [site.name for site in ctx.backbone.text_sites() if site.reads == reads]
            old, new, c_ND = [base[n] for n in names], [edited[n] for n in names], torch.cat(e.concepts)
            found_ND = adversary(old, new, c_ND, ridge=settings.adversary_ridge, unit=settings.ridge_unit)
            left, whole = left + _distance(old, c_ND, new, found_ND), whole + _distance(old, c_ND, new, c_ND)
            shares[reads] = _shares(e, found_ND, torch.cat(kept[reads]), settings, ridge=settings.round_ridge)
            kept[reads] += [found_ND] if settings.hold else []
        ctx.log(k + 1, settings.rounds, {"recovered": 1 - (left / whole) ** 0.5 if whole else 0.0})
        added = site_deltas(ctx, shares, edited)
        total |= {name: concatenate([total.get(name, {}), own]) for name, own in added.items()}
    return total


def _shares(
    e: SiteEmbeddings, read_ND: torch.Tensor, preserve_MD: torch.Tensor, settings: Rounds, *, ridge: float
) -> list[TextEdit]:
    """Each concept's share of the UCE edit that sends the rows `read_ND` to the goals and holds those of `preserve_MD`."""
    goal_ND, unit = torch.cat(e.goals), settings.ridge_unit
    joint = uce(read_ND, goal_ND, preserve_MD, lamb=ridge, unit=unit, erase_scale=1.0, preserve_scale=1.0)
    return [share.compressed() for share in joint.split([len(c) for c in e.concepts])]


def _edited(base: Mapping[str, torch.Tensor], deltas: Mapping[str, Deltas]) -> dict[str, torch.Tensor]:
    """The weights of the text sites with all deltas added."""
    total = concatenate(list(deltas.values()))
    return {name: w + to_dense(total[name]).to(w) if name in total else w for name, w in base.items()}


def _distance(
    base: Sequence[torch.Tensor], concept_ND: torch.Tensor, edited: Sequence[torch.Tensor], other_ND: torch.Tensor
) -> float:
    """The sum over layers of |W'_l c' - W_l c|^2."""
    pairs = zip(base, edited, strict=True)
    return sum(float((other_ND @ new.T - concept_ND @ old.T).square().sum()) for old, new in pairs)
