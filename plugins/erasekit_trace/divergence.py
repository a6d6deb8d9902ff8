"""Divergences on the one-step x0 (section 4.2), added to the latent loss every few steps.

A component of the slot `divergence` is called once per concept with (ctx, concept, pool) and gives a differentiable
function of (student's x0, target's x0) -> scalar. Detectors that numbers are measured with are never among them: what
is trained on cannot be evidence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from erasekit.concepts import Concept
from erasekit.errors import EnvironmentProblem
from erasekit.methods.context import RunContext
from erasekit.methods.trajectories import Pool

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PROBE_STEPS = 150


def probe(ctx: RunContext, concept: Concept, pool: Pool) -> Divergence:
    """Probability of the concept by a small network on latents, trained to tell the teacher's x0 under c_w from under c_u."""
    x0 = [ctx.backbone.to_x0(pool.predictions[:, k], pool.x, pool.tau).flatten(1).detach() for k in (0, 1)]
    data, label = torch.cat(x0), torch.cat([torch.ones(len(pool)), torch.zeros(len(pool))]).to(x0[0])
    generator = ctx.generator(f"trace/probe/{concept.name}")
    network = nn.Sequential(nn.Linear(data.shape[1], 64), nn.ReLU(), nn.Linear(64, 1)).to(data)
    for p in network.parameters():
        fan = p.shape[-1] if p.dim() > 1 else data.shape[1]
        p.data = ((torch.rand(p.shape, generator=generator) * 2 - 1) / fan**0.5).to(data)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.1)
    for _ in range(PROBE_STEPS):
        index = torch.randint(len(data), (64,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(network(data[index])[:, 0], label[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.requires_grad_(False).to(ctx.backbone.device)
    return lambda student, goal: network(student.flatten(1)).sigmoid().mean()


def clip(ctx: RunContext, concept: Concept, pool: Pool) -> Divergence:
    """How much more the student's image is like the concept's name than the target's image is."""
    scorer = ctx.component("scorer", ctx.backbone.domain)()
    text = scorer.text([concept.phrases[0]]).to(ctx.backbone.device)

    def divergence(student: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        mine = scorer.image(ctx.backbone.decode(student)) @ text.T
        with torch.no_grad():
            reference = scorer.image(ctx.backbone.decode(goal)) @ text.T
        excess: torch.Tensor = (mine - reference).clamp_min(0).mean()
        return excess

    return divergence


def lpips(ctx: RunContext, concept: Concept, pool: Pool) -> Divergence:
    """LPIPS (AlexNet) between the student's image and the target's.

    Raises:
        EnvironmentProblem: the network's weights cannot be loaded.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        distance = LearnedPerceptualImagePatchSimilarity(net_type="alex").to(ctx.backbone.device)
    except Exception as error:
        raise EnvironmentProblem(
            f"The weights of LPIPS cannot be loaded ({type(error).__name__}). Go online once, or choose 'probe'."
        ) from error
    distance.requires_grad_(False)
    return lambda student, goal: distance(*(ctx.backbone.decode(x0).clamp(-1, 1) for x0 in (student, goal)))
