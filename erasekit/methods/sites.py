"""Where closed-form methods meet a model: the embeddings that its text sites read, and the deltas of edits there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch

from erasekit.backbones.alignment import align
from erasekit.backbones.protocol import Backbone, Conditioning
from erasekit.concepts import Concept
from erasekit.erasures.deltas import Deltas, LowRank
from erasekit.errors import UsageError
from erasekit.methods.closedform import Moment, Pairs, TextEdit, add_products_, layer_deltas
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import concept_pairs, preserve_prompts

Tokens = Literal["last", "suffix", "all"]

BATCH = 8  # prompts whose embeddings are held in float64 at a time: 134 MB of FLUX.1's
TOGETHER = 64  # prompts that are encoded in one go, so that whoever watches sees one count


class SiteEmbeddings:
    """What the sites that read one kind of text are edited from, each part computed when a method first asks for it.

    All of it is as large as the width of an embedding, however many prompts there are and however many tokens they have.
    """

    def __init__(
        self,
        ctx: RunContext,
        reads: str,
        *,
        tokens: Tokens = "all",
        guides: Sequence[str] = (),
        shares: Mapping[str, Sequence[float]] | None = None,
        bare: bool = False,
        preserve: bool = True,
    ) -> None:
        """See `site_embeddings`."""
        self._ctx, self._reads, self._bare = ctx, reads, bare
        self._tokens: Tokens | Literal["end"] = "end" if bare and tokens == "last" else tokens
        self._guides, self._shares, self._preserves = guides, shares or {}, preserve

    @cached_property
    def pairs(self) -> tuple[Pairs, ...]:
        """For each concept the sums over embeddings of its prompts and what each should act like.

        Where guides share a concept each counts as its share, so a least-squares fit does too.

        Raises:
            UsageError: no prompt of a concept differs from its neutral prompt.
        """
        asked, found = self._ctx.prompts("erase"), []
        for concept in self._ctx.concepts:
            bare = [(phrase, concept.neutralise(phrase)) for phrase in concept.phrases]
            turned, pairs = bare if self._bare else concept_pairs(concept, asked), None
            turns = self._guides or (concept.neutral,)
            for guide, share in zip(turns, self._shares.get(concept.name, [1 / len(turns)] * len(turns)), strict=True):
                guided = concept.model_copy(update={"neutral": guide})
                goals = turned if guide == concept.neutral else [(prompt, guided.neutralise(prompt)) for prompt, _ in turned]
                for w_ND, u_ND in pair_rows(self._ctx.backbone, guided, goals, self._reads, self._tokens):
                    pairs = pairs or Pairs.empty(w_ND.shape[1], self._ctx.backbone.device)
                    pairs.add(w_ND, u_ND, weight=share)
            if pairs is None or not pairs.change_DD.any():
                raise UsageError(f"'{concept.name}' and what it should become encode alike: no prompt of it would change.")
            found.append(pairs)
        return tuple(found)

    @cached_property
    def vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The one vector of each concept that the paper's equations speak of, e_w and e_u, (concepts, width), float64.

        e_w is the last token of the concept's own name, said alone: it has read all of the name and nothing else, and it is the
        same whatever prompts or templates there are. e_u is the last token of the neutral words, said alone as well. The
        empty prompt has no words: there e_u is what stands in the place of e_w, as Thm 3.1 has u where w was. In CLIP that
        is the end token or a pad, which is the same token; the paper takes the end token for "empty", and the begin token,
        which published code takes, is no word at all (docs/explanation.md). Of a pooled embedding, which has no positions,
        it is that itself; of a model that reads a prompt twice the last reading's.
        """
        encode, own, goals = self._ctx.backbone.encode, [], []
        for concept in self._ctx.concepts:
            name = concept.phrases[0]
            neutral = concept.neutralise(name)
            mine, goal = encode([name]), encode([neutral])
            at, there = (0 if self._reads == "pooled" else int(c.lengths[0]) - 2 for c in (mine, goal))  # before the end token
            own.append(_read(mine, self._reads)[0, at])
            goals.append(_read(goal, self._reads)[0, there if neutral else at])
        e_w, e_u = (torch.stack(side).to(self._ctx.backbone.device, torch.float64) for side in (own, goals))
        return e_w, e_u

    @cached_property
    def end(self) -> torch.Tensor:
        """The end token of the empty prompt, the paper's "empty", (width,), float64; of a pooled embedding that itself."""
        empty = self._ctx.backbone.encode([""])
        at = 0 if self._reads == "pooled" else int(empty.lengths[0]) - 1
        return _read(empty, self._reads)[0, at].to(self._ctx.backbone.device, torch.float64)

    @cached_property
    def preserve(self) -> Moment:
        """Of what must not change, see `preserve_prompts`; the empty prompt counts as often as all others together."""
        kept = preserve_prompts(self._ctx) if self._preserves else [""]
        return kept_moment(self._ctx.backbone, kept, self._reads)

    @cached_property
    def captions(self) -> Moment:
        """Of the task's captions of all kinds."""
        return held(self._ctx.backbone, [p.text for p in self._ctx.prompts("captions")], self._reads)


def site_embeddings(
    ctx: RunContext,
    *,
    tokens: Tokens = "all",
    guides: Sequence[str] = (),
    shares: Mapping[str, Sequence[float]] | None = None,
    bare: bool = False,
    preserve: bool = True,
) -> dict[str, SiteEmbeddings]:
    """Embeddings of the concepts' training prompts, of what they should become, and of what must not change.

    Args:
        ctx: the run.
        tokens: which positions of a prompt are paired with its neutral prompt's (see `align`): the concept's `last`
            token, the `suffix` from there through the last pad, or `all` that the concept reaches. A pooled embedding
            has no positions and is one row for each prompt.
        guides: what takes the concept's place instead of its neutral words; several of them share it.
        shares: {concept: how much each guide counts}; left out, they are equal and sum to one. Less than that makes the
            concept's prompts weigh less against what is preserved.
        bare: of the concepts' prompts there are only their phrases by themselves, whose `last` token is paired with the
            guide's last one, as in UCE's code.
        preserve: what the concepts and the task ask to keep must not change; if not, the empty prompt alone.

    Returns:
        {"tokens" or "pooled": embeddings}, as the backbone's text sites read them.
    """
    kinds = sorted({site.reads for site in ctx.backbone.text_sites()})
    settings: dict[str, Any] = {"tokens": tokens, "guides": guides, "shares": shares, "bare": bare, "preserve": preserve}
    return {reads: SiteEmbeddings(ctx, reads, **settings) for reads in kinds}


def held(backbone: Backbone, prompts: Sequence[str], reads: str) -> Moment:
    """The moment of all embeddings of prompts, every pad included: a pad reads the whole prompt, each from its own place."""
    width = _read(backbone.encode([""]), reads).shape[-1]
    total_DD, count = torch.zeros(width, width, dtype=torch.float64, device=backbone.device), 0
    for i in range(0, len(prompts), TOGETHER):
        for read in _read(backbone.encode(prompts[i : i + TOGETHER]), reads).split(BATCH):
            rows_ND = read.flatten(0, 1).to(total_DD)
            add_products_(total_DD, rows_ND)
            count += len(rows_ND)
    return Moment(total_DD, count)


def kept_moment(backbone: Backbone, prompts: Sequence[str], reads: str) -> Moment:
    """The moment of what must not change, in which the empty prompt counts as often as all other prompts together.

    Guidance draws every image from two predictions, of its prompt and of the empty one.
    """
    others, empty = (held(backbone, texts, reads) for texts in ([p for p in prompts if p], [""]))
    times = max(1, len(prompts) - 1)
    return Moment(others.total_DD + times * empty.total_DD, others.count + times * empty.count)


def pair_rows(
    backbone: Backbone,
    concept: Concept,
    prompts: Sequence[tuple[str, str]],
    reads: str,
    tokens: Tokens | Literal["end"] = "all",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows e_w of one prompt after the other and what each should act like, float64; `prompts` come with their goals."""
    for prompt, neutral in prompts:
        mine, goal = backbone.encode([prompt]), backbone.encode([neutral])
        if reads == "pooled":
            yield _read(mine, reads)[0].double(), _read(goal, reads)[0].double()
        elif tokens == "all":
            yield align(mine, goal)
        elif tokens == "end":
            yield last_words(mine).double(), last_words(goal).double()
        else:
            ends = [span[-1] for phrase in concept.phrases for span in backbone.spans(prompt, phrase)]
            yield _from_last(mine, goal, ends, tokens)


def site_weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The base weight (out, width) of every text site, float64, on the device; the denoiser is not loaded for it."""
    return {site.name: backbone.weight(site.name).to(backbone.device).double() for site in backbone.text_sites()}


def site_deltas(
    ctx: RunContext, shares: Mapping[str, Sequence[TextEdit]], weights: Mapping[str, torch.Tensor]
) -> dict[str, Deltas]:
    """The deltas of each concept at every text site, on the CPU.

    Args:
        ctx: the run.
        shares: for each kind of text the edits of `ctx.concepts`, in order.
        weights: the weight W (out, width) of each site that the edits W D S are made of.
    """
    deltas: dict[str, Deltas] = {concept.name: {} for concept in ctx.concepts}
    for site in ctx.backbone.text_sites():
        parts = layer_deltas(shares[site.reads], weights[site.name])
        for own, delta in zip(deltas.values(), parts, strict=True):
            own[site.name] = LowRank(delta.up.cpu(), delta.down.cpu())
    return deltas


def _read(cond: Conditioning, reads: str) -> torch.Tensor:
    """What a site of that kind is given, (n, positions, width); a pooled embedding stands in one position."""
    return cond.tokens if cond.pooled is None or reads == "tokens" else cond.pooled[:, None]


def last_words(cond: Conditioning) -> torch.Tensor:
    """The embedding before each prompt's end token, in each reading; of the empty prompt CLIP's begin token or T5's pad."""
    readings = cond.readings()
    return torch.cat([read.tokens[torch.arange(len(read)), read.lengths - 2] for read in readings])


def _from_last(
    concept: Conditioning, goal: Conditioning, ends: Sequence[int], tokens: Tokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """The aligned rows of one prompt from the concept's last token on, or that one alone, in each reading.

    Args:
        concept: the prompt.
        goal: its neutral prompt.
        ends: where the concept's last tokens stand; in a reading that has none it is the prompt's last word.
        tokens: `last` or `suffix`.
    """
    w_MD, u_MD = align(concept, goal)
    start = concept.tokens.shape[1] - len(w_MD)  # `align` leaves out what both prompts begin with
    rows, begin = dict[int, None](), 0
    for read in concept.readings():
        stop = begin + read.tokens.shape[1]
        end = max((end for end in ends if begin <= end < stop), default=begin + int(read.lengths[0]) - 2)
        rows |= dict.fromkeys(max(0, at - start) for at in range(end, end + 1 if tokens == "last" else stop))
        begin = stop
    return w_MD[list(rows)], u_MD[list(rows)]
