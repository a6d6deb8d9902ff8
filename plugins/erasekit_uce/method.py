"""UCE (WACV 2024): every layer that reads text is solved for in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.concepts import Concept
from erasekit.erasures.deltas import Deltas, merged, summed
from erasekit.erasures.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.methods.closedform import RANK_ERROR, RidgeUnit, uce
from erasekit.methods.context import RunContext
from erasekit.methods.images import images_of
from erasekit.methods.method import Method, MethodConfig, OneOrSeveral
from erasekit.methods.prompts import guided_texts, phrased_prompts
from erasekit.methods.sites import Tokens, site_deltas, site_embeddings, site_weights

# What erased the objects of the mini world on validation prompts.
MINI = {"tokens": "all", "bare": False, "ridge": 1e-3, "ridge_unit": "relative"}


class UceConfig(MethodConfig):
    """Settings of UCE.

    The defaults are those of the published code (rohitgandikota/unified-concept-editing, April 2025), which has the same for
    Stable Diffusion and FLUX.1.
    """

    tokens: Tokens = Field(
        "last", description="edited positions: the concept's last token (published), the suffix from there, or all"
    )
    bare: bool = Field(
        True, description="the concept's phrases by themselves are its prompts (published), no templates or task's"
    )
    guides: OneOrSeveral = Field(
        (),
        description="what the concept becomes instead of its neutral words: '' is the empty prompt (published; styles 'art'), "
        "several phrases share it equally, or as often as images show them (debiasing)",
    )
    debias_rounds: int = Field(0, ge=0, description="how often the guides' shares are corrected by what images show")
    debias_images: int = Field(32, ge=1, description="images of each concept that a round looks at")
    ridge: float = Field(0.5, ge=0, description="lambda, how strongly the weights are held (published: 0.5)")
    ridge_unit: RidgeUnit = Field(
        "absolute", description="of the ridge: relative to the mean of the system's diagonal, or absolute as published"
    )
    erase_scale: float = Field(1.0, gt=0, description="weight of the erased embeddings (published: 1)")
    preserve_scale: float = Field(
        1.0, ge=0, description="weight of the preserved embeddings (published: 1, on what the user names; if nothing is, none)"
    )
    rank_error: float = Field(RANK_ERROR, ge=0, lt=1, description="what a lower rank may cost, relative, root mean square")
    robustify: OneOrSeveral = Field((), description="registered stages that harden the edit, e.g. rece")


class Uce(Method):
    """Unified Concept Editing (arXiv:2308.14761), the erasure of all concepts in one solve for each kind of text.

    On SD the sites are the K and V of every cross-attention, on FLUX.1 the two entrances. The published code edits one
    token of each prompt (`tokens` last); its empty guide is the begin token of CLIP and a pad of T5. The preset `official` is
    a run that names nothing to preserve. Debiasing moves the shares of the guides until images show each as often; the
    paper adds attributes to the concept, here guides hold both ("a female doctor").
    """

    name = "uce"
    version = 2  # all pads of preserved prompts are held; the rank is cut
    Config = UceConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd15-mini": MINI, "flux-mini": MINI}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": UceConfig(guides=("",), preserve_scale=0.0).model_dump()}
    slots = ("robustify",)
    curves: ClassVar[Mapping[str, str]] = {
        "off": "how far the share of images that fits a guide is from an equal one, at most, in the best round so far",
        "recovered": "of the concept, how much each round's closed-form embedding brought back",
    }
    config: UceConfig

    @property
    def seeded(self) -> bool:
        """Only debiasing draws images; what stages to harden the edit do is theirs."""
        return bool(self.config.debias_rounds or self.config.robustify)

    def texts(self, ctx: RunContext) -> list[str]:
        """Also what the guides make of the concepts' prompts."""
        return [*super().texts(ctx), *guided_texts(ctx, self.config.guides)]

    def erase(self, ctx: RunContext) -> Erasure:
        """Solve, then harden."""
        deltas = self.edit(ctx, self.shares(ctx))
        for name in self.config.robustify:
            deltas = ctx.component("robustify", name)(ctx, deltas, self.config)
        parts = {name: {"edit": own} for name, own in deltas.items()}
        return self.erasure(ctx, deltas=parts)

    def shares(self, ctx: RunContext) -> dict[str, list[float]]:
        """What debiasing makes of the guides' shares for each concept: those that came nearest to equal images.

        A round draws the concept's prompts with the edit, calls each image the guide whose prompt it fits best, and
        multiplies the guide's share by exp(1/guides - how often it was seen), in later rounds by a smaller step.

        Raises:
            UsageError: there is nothing to share.
        """
        guides, rounds = self.config.guides, self.config.debias_rounds
        if not rounds:
            return {}
        if len(guides) < 2:
            raise UsageError(f"Debiasing needs two guides or more, given {len(guides)}. Set method.guides.")
        equal = [1 / len(guides)] * len(guides)
        now = {concept.name: equal for concept in ctx.concepts}
        best, least = dict(now), dict.fromkeys(now, math.inf)
        scorer = ctx.component("scorer", ctx.backbone.domain)()  # what it lacks shows now
        for k in range(rounds):
            with merged(ctx.backbone.denoiser, summed(list(self.edit(ctx, now).values()))):
                seen = {concept.name: self.seen(ctx, concept, scorer) for concept in ctx.concepts}
            for name, often in seen.items():
                off = max(abs(share - equal[0]) for share in often)
                if off < least[name]:
                    best[name], least[name] = now[name], off
                moved = [s * math.exp((equal[0] - o) / (k + 1)) for s, o in zip(now[name], often, strict=True)]
                now[name] = [share / sum(moved) for share in moved]
            ctx.log(k + 1, rounds, {f"off/{name}": off for name, off in least.items()})
        return best

    @torch.no_grad()
    def seen(self, ctx: RunContext, concept: Concept, scorer: Any) -> list[float]:
        """How often images of a concept's prompts fit the prompt with each guide best."""
        prompts, generator = phrased_prompts(ctx, concept), ctx.generator(f"uce/debias/{concept.name}")
        x0, chosen = images_of(ctx, prompts, self.config.debias_images, generator)
        guided = [concept.model_copy(update={"neutral": guide}) for guide in self.config.guides]
        texts = {p: scorer.text([g.neutralise(p) for g in guided]).to(ctx.backbone.device) for p in dict.fromkeys(chosen)}
        pairs = zip(chosen, x0, strict=True)
        fits = [scorer.image(ctx.backbone.decode(latent[None])) @ texts[prompt].T for prompt, latent in pairs]
        counts = torch.cat(fits).argmax(1).bincount(minlength=len(guided))
        return (counts / len(chosen)).tolist()

    def edit(self, ctx: RunContext, shares: Mapping[str, Sequence[float]]) -> dict[str, Deltas]:
        """Each concept's share of the joint edit (Eq. 7), its guides sharing the concept as they are told to."""
        config, parts = self.config, {}
        prompts: dict[str, Any] = {"tokens": config.tokens, "guides": config.guides, "bare": config.bare}
        for reads, e in site_embeddings(ctx, **prompts, shares=shares).items():
            parts[reads] = uce(
                e.pairs,
                e.preserve.total_DD,
                lamb=config.ridge,
                unit=config.ridge_unit,
                erase_scale=config.erase_scale,
                preserve_scale=config.preserve_scale,
                error=config.rank_error,
            )
        return site_deltas(ctx, parts, site_weights(ctx.backbone))
