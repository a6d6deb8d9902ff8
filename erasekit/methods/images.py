"""Images that the base itself draws, for methods that train on some."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from erasekit.backbones.protocol import Conditioning, Predict, guided
from erasekit.backbones.sampler import follow
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import preserve_prompts


@torch.no_grad()
def draw(ctx: RunContext, cond: Conditioning, seeds: Sequence[int], *, predict: Predict | None = None) -> torch.Tensor:
    """Finished latents x0 (n, ...) of encoded prompts, one seed each, under the run's protocol; `predict` as in `guided`."""
    backbone, protocol = ctx.backbone, ctx.protocol
    empty = backbone.encode([""])

    def direction(x: torch.Tensor, tau: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return guided(backbone, x, tau, cond[rows], uncond=empty, scale=protocol.guidance, predict=predict)

    return follow(backbone, seeds, direction, steps=protocol.steps, size=protocol.size, batch=protocol.batch, what="images")


def images_of(ctx: RunContext, prompts: Sequence[str], n: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """`n` images of prompts, used in turn: x0 (n, ...), and the prompt of each; the generator draws their seeds."""
    chosen = [prompts[i % len(prompts)] for i in range(n)]
    return draw(ctx, ctx.backbone.encode(chosen), torch.randint(2**31, (n,), generator=generator).tolist()), chosen


def kept_images(ctx: RunContext, n: int, name: str, *, unasked: bool = True) -> tuple[torch.Tensor, Conditioning]:
    """`n` images of what is kept, x0 (n, ...), and their prompts; `name` names the generator of their seeds.

    They are of preserved prompts and of captions in turns, and every fifth of the empty prompt. Unasked, a model draws what it
    has often seen, the concept too; without `unasked` there is none of these.
    """
    preserved, captions = preserve_prompts(ctx)[1:], [p.text for p in ctx.prompts("captions")]
    turns = itertools.cycle([p for pair in itertools.zip_longest(preserved, captions) for p in pair if p is not None] or [""])
    chosen = ["" if unasked and i % 5 == 4 else next(turns) for i in range(n)]
    x0, _ = images_of(ctx, chosen, n, ctx.generator(name))
    return x0, ctx.backbone.encode(chosen)


def noised(ctx: RunContext, x0: torch.Tensor, tau: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents at progress `tau` (n,) on the way to `x0` from noise of a CPU generator."""
    return ctx.backbone.add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0), tau)
