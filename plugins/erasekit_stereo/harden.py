"""Words that bring a concept back, put into a closed form: a stage that hardens other methods' edits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.backbones.alignment import align
from erasekit.backbones.memory import Footprint
from erasekit.backbones.protocol import Conditioning
from erasekit.concepts import Concept
from erasekit.erasures.deltas import Deltas, merged, summed, to_dense
from erasekit.methods.closedform import RANK_ERROR, Pairs, uce
from erasekit.methods.component import Component
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.images import images_of
from erasekit.methods.prompts import concept_prompts
from erasekit.methods.sites import site_deltas, site_embeddings, site_weights
from erasekit.settings import Settings
from erasekit_stereo.words import learned, read

MINI = {"word_steps": 300, "word_lr": 2e-2}
RIDGE = 1e-3  # relative to the mean of the system's diagonal, for a method without one


class WordsConfig(Settings):
    """Settings of the stage. The edits have the ridge and the weights of the method that calls, if it has any."""

    rounds: int = Field(3, ge=0, description="how often words are learned and edited")
    words: int = Field(2, ge=1, description="words in a round, for each concept")
    word_steps: int = Field(3000, ge=1, description="training steps of a word (STEREO: 3000)")
    word_lr: float = Field(5e-3, gt=0, description="rate of AdamW for a word (STEREO: 5e-3)")
    batch: int = Field(4, ge=1, description="images in a step of a word")
    images: int = Field(16, ge=1, description="images of the concept that words are learned from")


class Words(Component):
    """The stage `words` of `robustify`: rounds of learned words, and edits in closed form against them.

    In each round words are learned that bring the concepts back in the model with all deltas on, as STEREO learns them
    (arXiv:2408.16807, section 4.1). What the text encoder makes of them in the concept's templates spans a subspace, and one
    UCE edit of the text sites W', all deltas merged, sends it to what W' makes of the templates with the neutral words. It
    holds what is preserved, the concepts, their neutral prompts, and the words of earlier rounds.
    """

    Config = WordsConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd15-mini": MINI, "flux-mini": MINI}
    config: WordsConfig

    def footprint(self, plan: Planned) -> Footprint:
        """The images of a word's step; a word itself is small."""
        return Footprint(rows=self.config.batch if self.config.rounds else 0)

    def rows(self, plan: Planned) -> float:
        """The words', and those of images of the concept."""
        own, passes = self.config, 2 if plan.backbone.capabilities.guidance == "cfg" else 1
        return 3.0 * own.rounds * own.words * own.word_steps * own.batch + own.images * plan.protocol.steps * passes

    def __call__(self, ctx: RunContext, deltas: Mapping[str, Deltas], method: Settings) -> dict[str, Deltas]:
        """Add the edits to the deltas.

        Args:
            ctx: the run.
            deltas: {concept: deltas of the base weights}; further names, e.g. of an adapter, count and stay as they are.
            method: the settings of the method that calls: `ridge`, `preserve_scale` and `rank_error` of them are the edits'.
        """
        settings, total = self.config, dict(deltas)
        embeddings, base = site_embeddings(ctx), site_weights(ctx.backbone)
        examples = [_examples(ctx, concept, settings.images) for concept in ctx.concepts]  # by the base
        scale, ridge = getattr(method, "preserve_scale", 1.0), getattr(method, "ridge", RIDGE)
        error = getattr(method, "rank_error", RANK_ERROR)
        kept = {reads: scale * e.preserve.total_DD for reads, e in embeddings.items()}
        for reads, e in embeddings.items():
            kept[reads] = sum((pairs.ww_DD + pairs.uu_DD for pairs in e.pairs), kept[reads])
        for k in range(settings.rounds):
            with merged(ctx.backbone.denoiser, summed(list(total.values()))):
                found = [self._found(ctx, concept, x0, k) for concept, x0 in zip(ctx.concepts, examples, strict=True)]
            shares = {}
            for reads in embeddings:
                pairs = [pairs_of(ctx, concept, each, reads) for concept, each in zip(ctx.concepts, found, strict=True)]
                shares[reads] = uce(pairs, kept[reads], lamb=ridge, error=error)
                kept[reads] = sum((p.ww_DD for p in pairs), kept[reads])
            together = summed(list(total.values()))
            edited = {name: w + to_dense(together[name]).to(w) if name in together else w for name, w in base.items()}
            added = site_deltas(ctx, shares, edited)
            total |= {name: summed([total.get(name, {}), delta]) for name, delta in added.items()}
        return total

    def _found(self, ctx: RunContext, concept: Concept, examples: torch.Tensor, k: int) -> list[Conditioning]:
        """The words of a round for one concept, each in its templates."""
        own = self.config
        how: dict[str, Any] = {"steps": own.word_steps, "batch": own.batch, "lr": own.word_lr}
        words = [learned(ctx, concept, examples, name=f"harden/{concept.name}/{k}/{i}", **how) for i in range(own.words)]
        return [read(ctx, word, concept.templates) for word in words]


def pairs_of(ctx: RunContext, concept: Concept, prompts: list[Conditioning], reads: str) -> Pairs:
    """Sums over the embeddings of words in a concept's templates, each with that of the template with the neutral words."""
    goals = ctx.backbone.encode([concept.neutralise(t.format(concept.phrases[0])) for t in concept.templates])
    pairs = Pairs.empty(_rows(goals, reads).shape[-1], ctx.backbone.device)
    for word in prompts:
        for i in range(len(word)):
            mine, goal = word[[i]], goals[[i]]
            w_ND, u_ND = align(mine, goal) if reads == "tokens" else (_rows(mine, reads)[0], _rows(goal, reads)[0])
            pairs.add(w_ND, u_ND)
    return pairs


def _rows(cond: Conditioning, reads: str) -> torch.Tensor:
    """What sites of a kind read of prompts, (n, positions, width)."""
    return cond.tokens if cond.pooled is None or reads == "tokens" else cond.pooled[:, None]


def _examples(ctx: RunContext, concept: Concept, n: int) -> torch.Tensor:
    """Images of a concept by the base, x0 (n, ...)."""
    prompts = concept_prompts(concept, ctx.prompts("erase"))
    return images_of(ctx, prompts, n, ctx.generator(f"harden/images/{concept.name}"))[0]
