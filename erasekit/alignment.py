"""Which embedding of a concept prompt should act like which embedding of its neutral prompt."""

from __future__ import annotations

import torch

from erasekit.backbone import Conditioning


def align(concept: Conditioning, neutral: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair the token embeddings of prompts, position by position, from where they first differ to the last pad.

    An edit has to hold at every position that the concept reaches: in CLIP all tokens after it, the end token and the
    pads (METHODS.md 6, item 3). Words after the concept are paired counted from the end of the prompt, so that neutral
    words of another length do not shift them; pads are paired by position.

    Args:
        concept: n prompts.
        neutral: their n neutral counterparts.

    Returns:
        Two tensors (m, width) in float64: the concept's embeddings and what each should act like.
    """
    pairs = [_align_one(*row) for row in zip(concept.tokens, neutral.tokens, concept.lengths, neutral.lengths, strict=True)]
    concepts, neutrals = zip(*pairs, strict=True)
    return torch.cat(concepts).double(), torch.cat(neutrals).double()


def _align_one(
    concept_LD: torch.Tensor, neutral_LD: torch.Tensor, length: torch.Tensor, neutral_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    differs = (concept_LD - neutral_LD).abs().amax(1) > 1e-4 * concept_LD.abs().max()
    start = int(differs.nonzero()[0]) if differs.any() else len(concept_LD)
    positions = torch.arange(start, len(concept_LD), device=concept_LD.device)
    shift = length - neutral_length
    partner = torch.where(positions < length, (positions - shift).clamp(min=start), positions)
    partner = partner.clamp(max=len(neutral_LD) - 1)
    return concept_LD[positions], neutral_LD[partner]
