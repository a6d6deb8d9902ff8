"""What the edited layers read: the inputs of MACE's closed forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from erasekit.backbones.attention import token_positions
from erasekit.backbones.protocol import Conditioning
from erasekit.concepts import Concept
from erasekit.methods.context import RunContext
from erasekit.methods.fusion import input_moments
from erasekit.methods.images import noised
from erasekit.methods.sites import pair_rows

TAUS = (0.0, 0.3, 0.6, 0.9)  # layers behind the entrance read other things at other points of the way


def beside(
    ctx: RunContext, concept: Concept, prompts: Sequence[str], reads: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings outside of the concept's phrase, of one prompt after the other, and what each is in the neutral prompt.

    In a causal encoder (CLIP) nothing before the phrase knows of it; in a bidirectional one (T5) every word does. The pooled
    embedding counts as one beside it.
    """
    phrase_NL = token_positions(ctx.backbone, prompts, concept.phrases).cpu()  # as the embeddings are
    turned = [(prompt, concept.neutralise(prompt)) for prompt in prompts]
    outside_NL = ~phrase_NL
    if ctx.backbone.capabilities.text == "causal":
        outside_NL &= phrase_NL.cumsum(1) > 0
    for (mine, goal), outside_L in zip(pair_rows(ctx.backbone, concept, turned, reads), outside_NL, strict=True):
        rest = outside_L[len(outside_L) - len(mine) :].to(mine.device) if reads == "tokens" else slice(None)
        yield mine[rest], goal[rest]


def hidden_moments(
    ctx: RunContext, layers: Sequence[str], x0: torch.Tensor, cond: Conditioning, name: str
) -> dict[str, torch.Tensor]:
    """Moments of what layers of the text stream read at a few points on the way to images `x0` of `cond`."""
    tau = torch.tensor(TAUS).repeat(len(x0))
    row = torch.arange(len(x0)).repeat_interleave(len(TAUS))
    x = noised(ctx, x0[row], tau, ctx.generator(name))
    return input_moments(ctx, layers, x, tau, cond[row])
