"""UCE (WACV 2024): every layer that reads text is solved for in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.closedform import RidgeUnit, uce
from erasekit.deltas import Deltas
from erasekit.erasure import Erasure
from erasekit.method import Method, MethodConfig, OneOrSeveral, RunContext
from erasekit.sites import Tokens, site_deltas, site_embeddings, site_weights


class UceConfig(MethodConfig):
    """Settings of UCE."""

    tokens: Tokens = Field("all", description="edited positions: the concept's last token, the suffix from there, or all")
    guides: OneOrSeveral = Field(
        (),
        description="what the concept becomes instead of its neutral words: '' is the empty prompt (moderation), "
        "several phrases share it (debiasing), one that is given twice counts twice",
    )
    ridge: float = Field(1e-3, ge=0, description="lambda, how strongly the weights are held")
    ridge_unit: RidgeUnit = Field(
        "relative", description="of the ridge: relative to the mean of the system's diagonal, or absolute as published"
    )
    erase_scale: float = Field(1.0, gt=0, description="weight of the erased embeddings")
    preserve_scale: float = Field(1.0, ge=0, description="weight of the preserved embeddings")
    robustify: OneOrSeveral = Field((), description="registered stages that harden the edit, e.g. rece")


class Uce(Method):
    """Unified Concept Editing (arXiv:2308.14761), the erasure of all concepts in one solve for each kind of text.

    On SD the sites are the K and V of every cross-attention, on FLUX.1 the two entrances. The published code edits one
    token of each prompt (`tokens` last); its empty guide is the begin token, here it is a pad. Its debiasing chooses the
    shares of the guides by looking at pictures; here they are equal.
    """

    name = "uce"
    Config = UceConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {"tokens": "last", "guides": [""], "ridge": 0.5, "ridge_unit": "absolute"},
    }
    slots = ("robustify",)
    config: UceConfig

    def erase(self, ctx: RunContext) -> Erasure:
        """Solve, then harden."""
        deltas = self.edit(ctx)
        for name in self.config.robustify:
            deltas = ctx.component("robustify", name)(ctx, deltas, self.config)
        parts = {name: {"edit": own} for name, own in deltas.items()}
        return Erasure.of(ctx, method=self.name, config=self.config.model_dump(), deltas=parts)

    def edit(self, ctx: RunContext) -> dict[str, Deltas]:
        """Each concept's share of the joint edit (Eq. 7)."""
        config, shares = self.config, {}
        for reads, e in site_embeddings(ctx, tokens=config.tokens, guides=config.guides).items():
            joint = uce(
                torch.cat(e.concepts),
                torch.cat(e.goals),
                e.preserve_MD,
                lamb=config.ridge,
                unit=config.ridge_unit,
                erase_scale=config.erase_scale / max(1, len(config.guides)),  # a row comes up once for each guide
                preserve_scale=config.preserve_scale,
            )
            shares[reads] = [share.compressed() for share in joint.split([len(c) for c in e.concepts])]
        return site_deltas(ctx, shares, site_weights(ctx.backbone))
