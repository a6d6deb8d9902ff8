"""What the edited layers read: the inputs of MACE's closed forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from erasekit.attention import token_positions
from erasekit.backbone import Conditioning
from erasekit.concepts import Concept
from erasekit.fusion import input_moments
from erasekit.method import RunContext
from erasekit.pictures import noised
from erasekit.sites import paired

TAUS = (0.0, 0.3, 0.6, 0.9)  # layers behind the entrance read other things at other points of the way


def kept(cond: Conditioning) -> torch.Tensor:
    """Tokens that are worth a row (n, length), bool: of the pads only the first, which stands for the rest."""
    return torch.arange(cond.tokens.shape[1]) <= cond.lengths[:, None]


def beside(ctx: RunContext, concept: Concept, prompts: Sequence[str], reads: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings outside of the concept's phrase, and what each is in the neutral prompt, float64.

    In CLIP nothing before the phrase knows of it; in T5 every word does. The pooled embedding counts as one beside it.
    """
    cond, neutral = (ctx.backbone.encode(p) for p in (prompts, [concept.neutralise(p) for p in prompts]))
    if reads == "pooled":
        return paired(cond, neutral, reads)
    phrase_NL = token_positions(ctx.backbone, prompts, concept.phrases).cpu()  # as the embeddings are
    outside_NL = ~phrase_NL
    if ctx.backbone.capabilities.family == "unet":
        outside_NL &= phrase_NL.cumsum(1) > 0
    pairs = []
    for i, outside_L in enumerate(outside_NL):
        mine, goal = paired(cond[[i]], neutral[[i]], reads)
        rest = outside_L[len(outside_L) - len(mine) :]
        pairs.append((mine[rest], goal[rest]))
    concepts, neutrals = zip(*pairs, strict=True)
    return torch.cat(concepts), torch.cat(neutrals)


def hidden_moments(
    ctx: RunContext, layers: Sequence[str], x0: torch.Tensor, cond: Conditioning, name: str
) -> dict[str, torch.Tensor]:
    """Moments of what layers of the text stream read at a few points on the way to pictures `x0` of `cond`."""
    tau = torch.tensor(TAUS).repeat(len(x0))
    row = torch.arange(len(x0)).repeat_interleave(len(TAUS))
    x = noised(ctx, x0[row], tau, ctx.generator(name))
    return input_moments(ctx, layers, x, tau, cond[row], kept(cond)[row])
