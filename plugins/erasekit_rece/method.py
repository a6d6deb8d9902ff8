"""RECE (ECCV 2024): after a closed-form edit, find the embeddings that still bring the concept back, and edit those too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field

from erasekit.erasures.deltas import Deltas, summed, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.methods.closedform import RANK_ERROR, Pairs, RidgeUnit, TextEdit, uce
from erasekit.methods.context import RunContext
from erasekit.methods.method import Method, MethodConfig
from erasekit.methods.prompts import guided_texts
from erasekit.methods.sites import Tokens, site_deltas, site_embeddings, site_weights
from erasekit_rece.solve import adversary

# Ridges mean what the published ones do where they are absolute.
ABSOLUTE = {"adversary_ridge": 0.1, "round_ridge": 0.1}
# What erased the objects of the mini world on validation prompts. For FLUX.1 too, for which nobody has published RECE: absolute
# ridges are made for the length of CLIP's embeddings, and T5's have another.
RELATIVE = {
    "bare": False,
    "ridge_unit": "relative",
    "ridge": 1e-3,
    "adversary_ridge": 1e-2,
    "round_ridge": 1e-3,
    "round_preserve_scale": 1.0,
    "hold": True,
}


class Rounds(MethodConfig):
    """Settings of the rounds, whatever edit they follow."""

    bare: bool = Field(False, description="the concept's phrases by themselves are its prompts, no templates or task's")
    preserve: bool = Field(
        True, description="preserve what the concepts and the task ask for; if not, the empty prompt alone, as published"
    )
    tokens: Tokens = Field("all", description="edited positions: the concept's last token, the suffix from there, or all")
    guides: tuple[str, ...] = Field(
        (),
        description="what the concept becomes instead of its neutral words: '' is the empty prompt (styles: 'art')",
    )
    ridge_unit: RidgeUnit = Field(
        "relative", description="of all ridges: relative to the mean of the system's diagonal, or absolute as published"
    )
    rounds: int = Field(1, ge=0, description="how often adversarial embeddings are found and edited")
    adversary_ridge: float = Field(1e-2, gt=0, description="how small adversarial embeddings are held")
    round_ridge: float = Field(1e-3, gt=0, description="lambda of the edits against them")
    round_preserve_scale: float = Field(1.0, ge=0, description="weight of the preserved embeddings in those edits")
    rank_error: float = Field(RANK_ERROR, ge=0, lt=1, description="what a lower rank may cost, relative, root mean square")
    hold: bool = Field(True, description="hold what earlier edits made of the concepts; the published rounds let it go")


class ReceConfig(Rounds):
    """Settings of RECE; those of the first edit are UCE's.

    The defaults are those of the published code (CharlesGong12/RECE, October 2024) for nudity and for objects that are easy
    to erase; that has one round for objects and styles, two for unsafe concepts and three for nudity.
    """

    bare: bool = Field(
        True, description="the concept's phrases by themselves are its prompts (published), no templates or task's"
    )
    ridge_unit: RidgeUnit = Field(
        "absolute", description="of all ridges: relative to the mean of the system's diagonal, or absolute as published"
    )
    ridge: float = Field(0.5, gt=0, description="lambda of the first edit (published: 0.5)")
    preserve_scale: float = Field(1.0, ge=0, description="weight of the preserved embeddings in the first edit (published: 1)")
    rounds: int = Field(
        1, ge=0, description="how often adversarial embeddings are found and edited (published: 1, unsafe 2, nudity 3)"
    )
    adversary_ridge: float = Field(
        0.1, gt=0, description="how small adversarial embeddings are held (published: 0.1, styles and hard objects 1e-3)"
    )
    round_ridge: float = Field(0.1, gt=0, description="lambda of the edits against them (published: 0.1)")
    round_preserve_scale: float = Field(
        0.1, ge=0, description="weight of the preserved embeddings in those edits (published: 0.1)"
    )
    hold: bool = Field(False, description="hold what earlier edits made of the concepts; the published rounds let it go")


class Rece(Method):
    """RECE (arXiv:2407.12383) for any number of concepts at once.

    Where the published code asks a detector after each round whether to go on, the number of rounds is a setting here. The
    official preset is that for objects; for nudity it is 3 rounds, for styles and hard objects an `adversary_ridge` of 1e-3.
    """

    name = "rece"
    version = 3  # all pads of preserved prompts are held; the rank is cut
    Config = ReceConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dit": RELATIVE, "sd15-mini": RELATIVE}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": ReceConfig(guides=("",), preserve=False).model_dump()}
    curves: ClassVar[Mapping[str, str]] = {
        "recovered": "of the concept, how much each round's closed-form embedding brought back"
    }
    config: ReceConfig
    seeded = False

    def texts(self, ctx: RunContext) -> list[str]:
        """Also what the guides make of the concepts' prompts."""
        return [*super().texts(ctx), *guided_texts(ctx, self.config.guides)]

    def erase(self, ctx: RunContext) -> Erasure:
        """UCE's edit, then the rounds."""
        config, weights = self.config, site_weights(ctx.backbone)
        shares = {}
        for reads, e in site_embeddings(ctx, **_prompts(config)).items():
            kept_DD = config.preserve_scale * e.preserve.total_DD
            shares[reads] = _shares(e.pairs, kept_DD, config, ridge=config.ridge)
        deltas = robustify(ctx, site_deltas(ctx, shares, weights), config)
        parts = {name: {"edit": own} for name, own in deltas.items()}
        return self.erasure(ctx, deltas=parts)


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
        config: the settings of the method that calls. Those that `Rounds` has too are used, its defaults for the others;
            where ridges are absolute, the published ones.

    Returns:
        The deltas of the base weights with the rounds' added, which has each concept's share: a sum of low-rank ones
        stays low-rank.
    """
    own = {name: getattr(config, name) for name in Rounds.model_fields if hasattr(config, name)}
    settings = Rounds(**(ABSOLUTE if own.get("ridge_unit") == "absolute" else {}) | own)
    embeddings = site_embeddings(ctx, **_prompts(settings))
    base, total = site_weights(ctx.backbone), dict(deltas)
    kept = {reads: settings.round_preserve_scale * e.preserve.total_DD for reads, e in embeddings.items()}
    for reads, e in embeddings.items() if settings.hold else ():
        kept[reads] = sum((pairs.ww_DD + pairs.uu_DD for pairs in e.pairs), kept[reads])
    for k in range(settings.rounds):
        edited, shares = _edited(base, total), {}
        left = whole = 0.0
        for reads, e in embeddings.items():
            names = [site.name for site in ctx.backbone.text_sites() if site.reads == reads]
            old, new = (torch.cat([weights[n] for n in names]) for weights in (base, edited))
            map_DD = adversary([old], [new], ridge=settings.adversary_ridge, unit=settings.ridge_unit)
            read_DD, found = torch.stack([p.ww_DD for p in e.pairs]).sum(0), [p.mapped(map_DD) for p in e.pairs]
            left, whole = left + _distance(new @ map_DD - old, read_DD), whole + _distance(new - old, read_DD)
            shares[reads] = _shares(found, kept[reads], settings, ridge=settings.round_ridge)
            kept[reads] = sum((p.ww_DD for p in found), kept[reads]) if settings.hold else kept[reads]
        ctx.log(k + 1, settings.rounds, {"recovered": 1 - (left / whole) ** 0.5 if whole else 0.0})
        added = site_deltas(ctx, shares, edited)
        total |= {name: summed([total.get(name, {}), own]) for name, own in added.items()}
    return total


def _prompts(settings: Rounds) -> dict[str, Any]:
    """Which embeddings of the concepts are edited, and to what."""
    return {"tokens": settings.tokens, "guides": settings.guides, "bare": settings.bare, "preserve": settings.preserve}


def _shares(pairs: Sequence[Pairs], kept_DD: torch.Tensor, settings: Rounds, *, ridge: float) -> list[TextEdit]:
    """Each concept's share of the UCE edit that sends the first of each pair to the second and holds what is kept."""
    return uce(pairs, kept_DD, lamb=ridge, unit=settings.ridge_unit, error=settings.rank_error)


def _edited(base: Mapping[str, torch.Tensor], deltas: Mapping[str, Deltas]) -> dict[str, torch.Tensor]:
    """The weights of the text sites with all deltas added."""
    total = summed(list(deltas.values()))
    return {name: w + to_dense(total[name]).to(w) if name in total else w for name, w in base.items()}


def _distance(change: torch.Tensor, moment_DD: torch.Tensor) -> float:
    """The sum of |Delta e|^2 over embeddings e with the moment sum e e^T, for one layer or several on top of each other."""
    return float(((change @ moment_DD) * change).sum())
