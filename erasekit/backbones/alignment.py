"""Which embedding of a concept prompt should act like which embedding of its neutral prompt."""

from __future__ import annotations

import torch

from erasekit.backbones.protocol import Conditioning


def align(concept: Conditioning, neutral: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair the token embeddings of prompts one to one, from where they first differ to the last pad.

    An edit has to hold at every position that the concept reaches (docs/explanation.md, "How text reaches an image"): in CLIP
    all tokens after it, the end token and the pads, in T5 all tokens of the prompt. Words that both prompts have before and
    after the concept are paired with each other, so that neutral words of another length do not shift them; what one of
    them has more of is paired with the other's pads. Attention does not see the order of text tokens, so if all pairs agree
    after an edit, all that the denoiser makes of the two prompts does. Each reading of a prompt is paired by itself.

    Args:
        concept: n prompts.
        neutral: their n neutral counterparts.

    Returns:
        Two tensors (m, width) in float64: the concept's embeddings and what each should act like.
    """
    rows = zip(*([cond[[i]] for i in range(len(cond))] for cond in (concept, neutral)), strict=True)
    pairs = [_align_one(*row) for row in rows]
    concepts, neutrals = zip(*pairs, strict=True)
    return torch.cat(concepts).double(), torch.cat(neutrals).double()


def _align_one(concept: Conditioning, neutral: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    mine_LD, goal_LD = concept.tokens[0], neutral.tokens[0]
    differs = (mine_LD - goal_LD).abs().amax(1) > 1e-4 * mine_LD.abs().max()
    start = int(differs.nonzero()[0]) if differs.any() else len(mine_LD)
    partners: list[int] = []
    for readings in zip(concept.readings(), neutral.readings(), strict=True):
        one, two = (_said(cond) for cond in readings)
        begin = len(partners)
        partners += [begin + partner for partner in _partners(one, two, readings[0].ids.shape[1])]
    partner = torch.tensor(partners, device=mine_LD.device)
    return mine_LD[start:], goal_LD[partner[start:]]


def _said(cond: Conditioning) -> list[int]:
    """The ids of a prompt up to its pads; what a chat template has behind a prompt counts, so that it is paired with itself."""
    ids, end = cond.ids[0].tolist(), int(cond.lengths[0])
    while any(token != ids[-1] for token in ids[end:]):
        end += 1
    return ids[:end]


def _partners(one: list[int], two: list[int], positions: int) -> list[int]:
    """For each of all positions of a prompt its partner in the other one, a permutation."""
    before = _common(one, two)
    after = _common(one[before:][::-1], two[before:][::-1])
    mine, theirs = (list(range(before, len(ids) - after)) for ids in (one, two))  # where they differ
    pads, their_pads = list(range(len(one), positions)), list(range(len(two), positions))
    both = min(len(mine), len(theirs))
    rest, their_rest = mine[: len(mine) - both], theirs[: len(theirs) - both]  # the last words of a phrase are its noun
    more, less = len(rest), len(their_rest)
    pairs = [(i, i) for i in range(before)]
    pairs += [(len(one) - k, len(two) - k) for k in range(1, after + 1)]
    pairs += zip(mine[more:] + rest, theirs[less:] + their_pads[:more], strict=True)
    pairs += zip(pads, their_rest + their_pads[more:], strict=True)
    return [partner for _, partner in sorted(pairs)]


def _common(one: list[int], two: list[int]) -> int:
    """How many entries two sequences begin with alike."""
    n = min(len(one), len(two))
    return next((k for k in range(n) if one[k] != two[k]), n)
