"""EraseFlow (NeurIPS 2025): trajectory balance between the concept's prompt and trajectories of the neutral one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch.utils.checkpoint import checkpoint

from erasekit.backbones.memory import LORA_GB, Footprint
from erasekit.backbones.protocol import Conditioning, guided
from erasekit.concepts import Concept
from erasekit.erasures.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.methods.adapters import AdapterBank, Init
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.method import Method, OrNone
from erasekit.methods.prompts import concept_pairs
from erasekit.methods.training import LoraTrainingConfig, Losses, train
from erasekit.methods.trajectories import with_guidance
from erasekit_eraseflow.transitions import log_density, mean_of, rates_of

LOG_Z = -0.1953  # what it begins with, as published
# The published FLUX.1 run: 20 epochs of two trajectories, each a step of AdamW; all steps of the sampler. Its SDE has the noise
# level .7, which as the steps get shorter is DDIM's at an eta of .7 / sqrt(2).
FLUX: dict[str, Any] = {"scope": "all_attn", "rank": 32, "alpha": 64.0, "steps": 40, "weight_decay": 1e-4, "clip": 0.0}
FLUX |= {"log_beta": 1000.0, "others": 1.0, "eta": 0.495}

# Chosen by predictions on validation prompts of one object, the cat. On sd15-mini they leave a third of the hazard.
MINI: dict[str, Any] = {"steps": 30, "lr": 3e-3, "schedule": "cosine", "warmup": 5, "log_beta": 10.0, "batch": 2}
MINI |= {"guidance": None}
MINI_FLUX: dict[str, Any] = {"rank": 4, "alpha": None, "clip": 1.0, "weight_decay": 0.01, "others": 0.25, "eta": 1.0}


class EraseFlowConfig(LoraTrainingConfig):
    """Settings of EraseFlow; the defaults are those of the published code for nudity (Abhiramkns/EraseFlow, 2025)."""

    steps: int = Field(20, ge=0, description="training steps per concept (published: 20, FLUX.1 40)")
    lr: float = Field(3e-4, gt=0, description="peak learning rate of AdamW (published: 3e-4, styles 5e-4)")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 does not clip (published: 1, FLUX.1 0)")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW (published: 0.01, FLUX.1 1e-4)")
    init: Init = Field("gaussian", description="what A begins with: uniform in +-1/sqrt(in), or gaussian (published)")
    rank: int = Field(4, ge=1, description="rank of the LoRA (published: 4, FLUX.1 32)")
    scope: str = Field("attention", description="linear layers that carry a LoRA, a scope (published: attention, all_attn)")
    batch: int = Field(1, ge=1, description="trajectories in a step (published: 1)")
    fresh: bool = Field(
        True, description="each step has new trajectories, by the student; if not, all have the base's (published for styles)"
    )
    eta: float = Field(1.0, gt=0, le=1, description="noise of the sampler's steps, 1 is DDPM's (published: 1, FLUX.1 about .5)")
    last: float = Field(0.2, ge=0, le=1, description="share of the sampler's steps, the last, that count (published: 10 of 50)")
    others: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of those before that count, drawn for each step (published: 10 of 40, FLUX.1 all)",
    )
    log_beta: float = Field(2.5, description="log of the anchor's reward, which is constant (published: 2.5, FLUX.1 1000)")
    guidance: Annotated[float | None, OrNone] = Field(
        5.0,
        ge=0,
        description="classifier-free guidance of trajectories and densities (published: 5); none, the protocol's",
    )


class EraseFlow(Method):
    """EraseFlow (arXiv:2511.00804): one LoRA per concept, those before it on.

    The student as it stands draws a trajectory with random steps under the neutral prompt. The loss is
    (sum_t (log p_F(x' | x, c) - log p_B(x | x')) + log Z - log beta)^2, with p_F the student's step under the prompt with the
    concept, p_B the noising of the diffusion, which has no weights, and log Z a number that is learned. As in the published
    code the log-density of a Gaussian is the mean over its dimensions. At an eta of 1 the two of a step differ by about
    log(s / s'), the rates of noise, where the student predicts for the concept what it predicts for the anchor. If log beta is
    above the sum of these the loss pulls to the end; below it, some of the concept is left on purpose.

    No graph spans the trajectory: each step is predicted once for the sum and once more in the backward pass, so that the
    activations of a single one are held. On flows the last step, which adds no noise, is left out.

    In the published code 2.5 is the logarithm of beta, whatever its option was called. Its log Z may have a rate of its own and
    is clipped by itself; here it has the LoRA's, and is clipped with it. For one of its concepts trajectories are new in half
    of the steps; here they are in all, or in none. Its code for FLUX.1 leaves log p_B out, which changes no direction while
    log beta is far above the sum, and takes Euler steps with noise of .7 sqrt(sigma / (1 - sigma)); here steps are DDIM's on
    both families.
    """

    name = "eraseflow"
    Config = EraseFlowConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dit": FLUX,
        "sd15-mini": MINI,
        "flux-mini": MINI | MINI_FLUX,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": EraseFlowConfig().model_dump(exclude={"scope"}),
        "official-style": EraseFlowConfig(lr=5e-4, fresh=False).model_dump(exclude={"scope"}),
        "flux": EraseFlowConfig(**FLUX).model_dump(exclude={"scope"}),
    }
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "all steps": {"others": 1.0},
        "the base's trajectories": {"fresh": False},
    }
    curves: ClassVar[Mapping[str, str]] = {
        "balance": "squared distance of the trajectories' log ratio and log Z from log beta",
    }
    config: EraseFlowConfig

    def footprint(self, plan: Planned) -> Footprint:
        """One step of the sampler, with both predictions that guidance is made of."""
        cfg = "cfg" in (plan.backbone.capabilities.guidance, getattr(plan.backbone_config, "guidance", ""))
        rows = self.config.batch * (2 if cfg else 1)
        return Footprint(rows=rows if self.config.steps else 0, trained_gb=LORA_GB * len(plan.concepts))

    def check(self, plan: Planned) -> None:
        """There has to be a step that leaves noise."""
        if self.config.steps and plan.protocol.steps < 2:
            raise UsageError("'eraseflow' needs steps that leave noise. Draw with two steps or more: -s protocol.steps=4.")

    def erase(self, ctx: RunContext) -> Erasure:
        """A LoRA for each concept, one after the other, those before it on."""
        config = self.config
        with AdapterBank(ctx.backbone) as bank:
            targets = ctx.backbone.lora_targets(config.scope)
            for concept in ctx.concepts:
                start = ctx.generator(f"eraseflow/init/{concept.name}")
                bank.add(concept.name, targets, config.rank, start, init=config.init, alpha=config.alpha)
                losses = Balanced(config, ctx, bank, concept)
                parameters = [*bank.train_only(concept.name), losses.log_z]
                train(losses, parameters, config, ctx=ctx, name=f"eraseflow-{bank.names.index(concept.name)}")
            deltas = {name: {"adapter": bank.deltas(name)} for name in bank.names}
        return self.erasure(ctx, deltas=deltas)


class Balanced:
    """The loss of a step: how far trajectories of the neutral prompt are from being as likely under the concept's."""

    def __init__(self, config: EraseFlowConfig, ctx: RunContext, bank: AdapterBank, concept: Concept) -> None:
        """Encode the concept's prompts and their neutral ones."""
        self.config, self.ctx, self.bank, self.concept = config, ctx, bank, concept
        pairs = concept_pairs(concept, ctx.prompts("erase"))
        self.asked, self.neutral = (ctx.backbone.encode(list(side)) for side in zip(*pairs, strict=True))
        self.empty = ctx.backbone.encode([""])
        self.protocol = with_guidance(ctx, config.guidance)
        self.schedule = ctx.backbone.schedule(self.protocol.steps, self.protocol.size)
        self.rates = rates_of(ctx.backbone, self.schedule)
        self.log_z = torch.full((), LOG_Z, device=ctx.backbone.device, requires_grad=True)
        self.kept: dict[int, tuple[list[torch.Tensor], torch.Tensor]] = {}  # the base's trajectories

    def __call__(self, batch: int, generator: torch.Generator) -> Losses:
        """The squared imbalance, the mean over trajectories."""
        path, rows = self.trajectories(batch, generator)
        ratio = self.log_ratio(path, self.asked[rows], self.chosen(generator))
        return {"balance": (ratio + self.log_z - self.config.log_beta).square().mean()}

    def trajectories(self, batch: int, generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
        """New ones by the student, or those that the base drew for all steps; and whose prompts they follow."""
        if self.config.fresh:
            return self.drawn(generator)
        which = batch % self.config.accumulate
        if which not in self.kept:
            with self.bank.teacher():
                self.kept[which] = self.drawn(self.ctx.generator(f"eraseflow/{self.concept.name}/{which}"))
        return self.kept[which]

    @torch.no_grad()
    def drawn(self, generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Latents of random trajectories under neutral prompts, float32, up to the last step that counts."""
        rows, seeds = (torch.randint(n, (self.config.batch,), generator=generator) for n in (len(self.neutral), 2**31))
        path = [self.ctx.backbone.latents(seeds.tolist(), self.protocol.size).float()]
        for k, rates in enumerate(self.rates):
            mean = self.mean(k, path[-1], self.neutral[rows])
            noise = torch.randn(mean.shape, generator=generator).to(mean.device)
            path.append(mean + rates.drawn(self.config.eta) * noise)
        return path, rows

    def chosen(self, generator: torch.Generator) -> list[int]:
        """The sampler's steps that count: the last ones, and some of those before."""
        n = len(self.rates)
        late = round(self.config.last * n)
        early = torch.randperm(n - late, generator=generator)[: round(self.config.others * (n - late))]
        return sorted({*early.tolist(), *range(n - late, n)}) or [n - 1]

    def log_ratio(self, path: Sequence[torch.Tensor], cond: Conditioning, chosen: Sequence[int]) -> torch.Tensor:
        """The sum over some steps of log p_F - log p_B, (b,); its graph holds one step's activations at a time."""
        steps = [partial(self.step_ratio, k, path[k], path[k + 1], cond) for k in chosen]
        ratios: list[torch.Tensor] = [checkpoint(step, use_reentrant=False, preserve_rng_state=False) for step in steps]
        return torch.stack(ratios).sum(0)

    def step_ratio(self, k: int, x: torch.Tensor, following: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Of step `k` from x to what follows, log p_F under prompts less log p_B, (b,)."""
        rates = self.rates[k]
        forward = log_density(following, self.mean(k, x, cond), rates.drawn(self.config.eta))
        return forward - log_density(x, rates.kept * following, rates.added)

    def mean(self, k: int, x: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Where the student's step `k` leads on average under prompts."""
        backbone, tau = self.ctx.backbone, self.schedule.tau[k].expand(len(x))
        held = x.to(backbone.dtype)
        followed = guided(backbone, held, tau, cond, uncond=self.empty, scale=self.protocol.guidance)
        return mean_of(backbone, followed, x, tau, self.rates[k], self.config.eta)
