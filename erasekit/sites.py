"""Where closed-form methods meet a model: the embeddings that its text sites read, and the deltas of edits there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from erasekit.alignment import align
from erasekit.backbone import Backbone, Conditioning
from erasekit.closedform import TextEdit, layer_deltas
from erasekit.concepts import Concept
from erasekit.deltas import Deltas
from erasekit.errors import UsageError
from erasekit.method import RunContext
from erasekit.tasks import Prompt, Split

SPLITS: tuple[Split, ...] = ("train", "validation")
SETS = ("erase", "synonyms", "preserve", "clean", "captions")
Tokens = Literal["last", "suffix", "all"]


@dataclass(frozen=True, eq=False)
class SiteEmbeddings:
    """What the sites that read one kind of text are edited from, float64.

    Attributes:
        concepts: for each concept e_w, (n, width).
        goals: for each concept what each of its rows should act like, (n, width). Where guides share a concept, the rows of
            both are scaled by the root of the guide's share: a least-squares fit then counts each guide as its share.
        preserve_MD: embeddings that must not change.
    """

    concepts: tuple[torch.Tensor, ...]
    goals: tuple[torch.Tensor, ...]
    preserve_MD: torch.Tensor


def site_embeddings(
    ctx: RunContext,
    *,
    tokens: Tokens = "all",
    guides: Sequence[str] = (),
    shares: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, SiteEmbeddings]:
    """Embeddings of the concepts' training prompts, of what they should become, and of what must not change.

    Args:
        ctx: the run.
        tokens: which positions of a prompt are paired with its neutral prompt's (see `align`): the concept's `last`
            token, the `suffix` from there through the last pad, or `all` that the concept reaches. A pooled embedding
            has no positions and is one row for each prompt.
        guides: what takes the concept's place instead of its neutral words; several of them share it.
        shares: {concept: the share of each guide}, which sum to one; left out, they are equal.

    Returns:
        {"tokens" or "pooled": embeddings}, as the backbone's text sites read them.

    Raises:
        UsageError: no prompt of a concept differs from its neutral prompt.
    """
    kept, asked = preserve_prompts(ctx), ctx.prompts("erase")
    found: dict[str, SiteEmbeddings] = {}
    for reads in sorted({site.reads for site in ctx.backbone.text_sites()}):
        pairs = []
        for concept in ctx.concepts:
            turns = guides or (concept.neutral,)
            weights = (shares or {}).get(concept.name, [1 / len(turns)] * len(turns))
            weighted = list(zip(turns, weights, strict=True))
            pairs.append(_pairs(ctx, concept, concept_prompts(concept, asked), reads, tokens, weighted))
        concepts, goals = zip(*pairs, strict=True)
        found[reads] = SiteEmbeddings(concepts, goals, kept_rows(ctx.backbone, kept, reads))
    return found


def concept_prompts(concept: Concept, asked: Sequence[Prompt]) -> list[str]:
    """Prompts that ask for one concept: its phrases in its templates, then those of the task's that do."""
    return list(dict.fromkeys([*concept.prompts(), *(p.text for p in asked if p.concept == concept.name)]))


def phrased_prompts(ctx: RunContext, concept: Concept) -> list[str]:
    """Training prompts of one concept that hold one of its phrases as whole words.

    Raises:
        UsageError: there is none.
    """
    prompts = [prompt for prompt in concept_prompts(concept, ctx.prompts("erase")) if concept.find(prompt)]
    if not prompts:
        raise UsageError(f"No prompt of '{concept.name}' holds its phrases ({', '.join(concept.phrases)}) as whole words.")
    return prompts


def preserve_prompts(ctx: RunContext) -> list[str]:
    """The empty prompt, what the concepts ask to keep (in their templates), and the task's preserved prompts."""
    erased = {phrase for concept in ctx.concepts for phrase in concept.phrases}
    kept = [t.format(p) for c in ctx.concepts for p in c.preserve if p not in erased for t in c.templates]
    return list(dict.fromkeys(["", *kept, *(p.text for p in ctx.prompts("preserve"))]))


def guided_texts(ctx: RunContext, guides: Sequence[str]) -> list[str]:
    """The training prompts of the concepts with each guide in the concept's place."""
    guided = [(concept, concept.model_copy(update={"neutral": guide})) for concept in ctx.concepts for guide in guides]
    return [g.neutralise(p) for concept, g in guided for p in concept_prompts(concept, ctx.prompts("erase"))]


def training_texts(ctx: RunContext) -> list[str]:
    """The prompts of the concepts and of the task's training and validation splits, and the neutral forms of all of them."""
    asked = [p for split in SPLITS for which in SETS for p in ctx.prompts(which, split)]
    own = [prompt for concept in ctx.concepts for prompt in concept_prompts(concept, asked)]
    found = [*preserve_prompts(ctx), *own, *(p.text for p in asked), *(c.neutral for c in ctx.concepts)]
    found += [concept.neutralise(prompt) for concept in ctx.concepts for prompt in own]
    for prompt in own:
        for concept in ctx.concepts:
            prompt = concept.neutralise(prompt)
        found.append(prompt)
    return list(dict.fromkeys(found))


def rows(cond: Conditioning, reads: str) -> torch.Tensor:
    """All embeddings of prompts as rows (m, width), float64; of the pads only the first, which stands for the rest."""
    if cond.pooled is not None and reads == "pooled":
        return cond.pooled.double()
    kept = torch.arange(cond.tokens.shape[1], device=cond.lengths.device) <= cond.lengths[:, None]
    return cond.tokens[kept.to(cond.tokens.device)].double()


def paired(concept: Conditioning, neutral: Conditioning, reads: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows e_w of prompts and what each should act like, float64: pooled embeddings, or tokens as `align` pairs them."""
    if concept.pooled is not None and neutral.pooled is not None and reads == "pooled":
        return concept.pooled.double(), neutral.pooled.double()
    return align(concept, neutral)


def kept_rows(backbone: Backbone, prompts: Sequence[str], reads: str) -> torch.Tensor:
    """The rows of prompts that must not change; of the empty prompt, which guidance is measured from, every pad too."""
    kept = rows(backbone.encode(prompts), reads)
    return kept if reads == "pooled" else torch.cat([kept, backbone.encode([""]).tokens[0].double()])


def site_weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The base weight (out, width) of every text site, float64, on the CPU; the denoiser is not loaded for it."""
    return {site.name: backbone.weight(site.name).cpu().double() for site in backbone.text_sites()}


def site_deltas(
    ctx: RunContext, shares: Mapping[str, Sequence[TextEdit]], weights: Mapping[str, torch.Tensor]
) -> dict[str, Deltas]:
    """The deltas of each concept at every text site.

    Args:
        ctx: the run.
        shares: for each kind of text the edits of `ctx.concepts`, in order.
        weights: the weight W (out, width) of each site that the edits W D S are made of.
    """
    deltas: dict[str, Deltas] = {concept.name: {} for concept in ctx.concepts}
    for site in ctx.backbone.text_sites():
        parts = layer_deltas(shares[site.reads], weights[site.name])
        for own, delta in zip(deltas.values(), parts, strict=True):
            own[site.name] = delta
    return deltas


def _pairs(
    ctx: RunContext,
    concept: Concept,
    prompts: Sequence[str],
    reads: str,
    tokens: Tokens,
    guides: Sequence[tuple[str, float]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows e_w of one concept and what each should act like, for guides with their shares."""
    encode, found = ctx.backbone.encode, []
    mine = encode(prompts)
    for guide, share in guides:
        goal = encode([concept.model_copy(update={"neutral": guide}).neutralise(p) for p in prompts])
        if tokens == "all" or reads == "pooled":
            aligned = [paired(mine, goal, reads)]
        else:
            ends = [_last_token(ctx.backbone, concept, p, int(n)) for p, n in zip(prompts, mine.lengths, strict=True)]
            aligned = [_from_last(mine[[i]], goal[[i]], end, tokens) for i, end in enumerate(ends)]
        found += [(w_ND * share**0.5, u_ND * share**0.5) for w_ND, u_ND in aligned]
    concepts, goals = (torch.cat(side) for side in zip(*found, strict=True))
    if torch.equal(concepts, goals):
        raise UsageError(f"'{concept.name}' and what it should become encode alike: no prompt of it would change.")
    return concepts, goals


def _last_token(backbone: Backbone, concept: Concept, prompt: str, length: int) -> int:
    """The position of the concept's last token in a prompt; of the prompt's last word where its tokens stand apart."""
    ends = [span[-1] for phrase in concept.phrases for span in backbone.spans(prompt, phrase)]
    return max(ends, default=length - 2)


def _from_last(concept: Conditioning, goal: Conditioning, end: int, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The aligned rows of one prompt from position `end` on, or that one alone."""
    w_MD, u_MD = align(concept, goal)
    first = max(0, end - (concept.tokens.shape[1] - len(w_MD)))  # `align` leaves out what both prompts begin with
    kept = slice(first, first + 1 if tokens == "last" else None)
    return w_MD[kept], u_MD[kept]
