"""GEM (ICML 2026): a LoRA that is pulled to an anchor's predictions and pushed off the concept's, on the student's own path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.backbones.memory import LORA_GB, Footprint
from erasekit.backbones.protocol import Conditioning
from erasekit.concepts import Concept
from erasekit.erasures.erasure import Erasure
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.method import Method
from erasekit.methods.prompts import concept_pairs
from erasekit.methods.training import LoraTrainingConfig, Losses, train
from erasekit.methods.trajectories import at_scale, predict_each, steer

# Chosen on validation prompts. With an eta of 1 the loss is zero half-way between concept and anchor already. A higher rank
# at a rate that does not fall moves everything else further: nothing holds it.
MINI: dict[str, Any] = {"steps": 100, "lr": 2e-3, "rank": 4, "eta": 0.25, "schedule": "cosine", "warmup": 10}


class GemConfig(LoraTrainingConfig):
    """Settings of GEM; the defaults are those of the published code for FLUX.1."""

    steps: int = Field(
        25,
        ge=0,
        description="training steps per concept, a trajectory each (published: 250 points of 10 each, violence 500)",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW (published: 1e-3, Stable Diffusion 3 2e-4)")
    rank: int = Field(16, ge=1, description="rank of the LoRA (published: 16)")
    scope: str = Field("qk_dual", description="linear layers that carry a LoRA, a scope of the backbone (published: qk_dual)")
    eta: float = Field(1.0, ge=0, description="how strongly the concept repels (published: 1)")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW (published: 0.01)")
    gamma: float = Field(100.0, gt=0, description="weight of the loss (published: 100)")
    share: float = Field(
        0.36, gt=0, le=1, description="share of the sampler's steps that are trained, from the first (published: 10 of 28)"
    )
    batch: int = Field(10, ge=1, description="points of a trajectory in a pass; `accumulate` passes share all of them")
    guidance: float = Field(3.0, ge=0, description="guidance scale of the student's trajectories (published: 3)")


class Gem(Method):
    """GEM (arXiv:2606.00140), written for flows; on Stable Diffusion it trains keys and values.

    A prompt of the concept is followed by the student as it stands. At the points of its first steps the loss is
    gamma/n sum relu(|f(x, c_w) - T(x, c_u)| - eta |f(x, c_w) - T(x, c_w)|), with f the student and T the base: zero where the
    student is nearer to the neutral prompt than to the concept. Nothing else is preserved: the anchor does it.

    The published code has one LoRA for all concepts, with a dropout of 0.1, and takes each point after the step whose time it
    tells the model, eleven of a trajectory. Here each concept has its own, without dropout, and a point its own time.
    """

    name = "gem"
    Config = GemConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {"scope": "kv"},
        **{name: {"lr": 2e-4} for name in ("sd35-medium", "sd35-large")},  # published for Stable Diffusion 3
        "sd15-mini": MINI,
        "flux-mini": MINI | {"steps": 60},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": GemConfig().model_dump(exclude={"scope"})}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {"without repulsion": {"eta": 0.0}, "all steps": {"share": 1.0}}
    config: GemConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Points of one trajectory."""
        return Footprint(rows=self.config.batch if self.config.steps else 0, trained_gb=LORA_GB * len(plan.concepts))

    def erase(self, ctx: RunContext) -> Erasure:
        """A LoRA for each concept, one after the other, those before it on."""
        with AdapterBank(ctx.backbone) as bank:
            targets = ctx.backbone.lora_targets(self.config.scope)
            for concept in ctx.concepts:
                bank.add(
                    concept.name,
                    targets,
                    self.config.rank,
                    ctx.generator(f"gem/init/{concept.name}"),
                    init=self.config.init,
                    alpha=self.config.alpha,
                )
                losses = Repelled(self.config, ctx, bank, concept)
                train(losses, bank.train_only(concept.name), self.config, ctx=ctx, name=f"gem-{bank.names.index(concept.name)}")
            deltas = {name: {"adapter": bank.deltas(name)} for name in bank.names}
        return self.erasure(ctx, deltas=deltas)


class Repelled:
    """The loss of a step on a trajectory of the student as it stands, drawn afresh for every step."""

    def __init__(self, config: GemConfig, ctx: RunContext, bank: AdapterBank, concept: Concept) -> None:
        """Encode the concept's prompts and their neutral ones."""
        self.config, self.ctx, self.bank, self.concept = config, ctx, bank, concept
        pairs = concept_pairs(concept, ctx.prompts("erase"))
        self.asked, self.neutral = (ctx.backbone.encode(list(side)) for side in zip(*pairs, strict=True))
        self.empty = ctx.backbone.encode([""])
        self.protocol = ctx.protocol if ctx.backbone.embedded_guidance else at_scale(ctx.protocol, config.guidance)
        self.points: tuple[torch.Tensor, torch.Tensor, int] | None = None
        self.step = -1  # whose points they are

    def __call__(self, batch: int, generator: torch.Generator) -> Losses:
        """The loss of batch number `batch`: its share of the points of the step's trajectory."""
        step, part = divmod(batch, self.config.accumulate)
        if self.points is None or step != self.step:
            self.step = step
            self.points = self.trajectory(self.ctx.generator(f"gem/{self.concept.name}/{step}"))
        x, tau, row = self.points
        n = max(len(x), self.config.accumulate)  # every pass has a point, if need be one that another pass has too
        here = (torch.arange(n) % len(x)).tensor_split(self.config.accumulate)[part]
        x, tau = x[here], tau[here]
        asked, neutral = (side[[row]].repeat(len(x)) for side in (self.asked, self.neutral))
        with torch.no_grad(), self.bank.teacher():
            concept, anchor = predict_each(self.ctx.backbone, self.protocol, x, tau, [asked, neutral])
        student = self.ctx.backbone.predict(x, tau, asked, guidance=self.protocol.guidance)
        return {"repel": repelled(student, anchor, concept, eta=self.config.eta, gamma=self.config.gamma)}

    @torch.no_grad()
    def trajectory(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Latents and progress of the first steps of one of the student's trajectories, and whose prompt it follows."""
        backbone, protocol = self.ctx.backbone, self.protocol
        row, seed = (int(torch.randint(n, (1,), generator=generator)) for n in (len(self.asked), 2**31))
        schedule = backbone.schedule(protocol.steps, protocol.size)
        n = max(1, round(self.config.share * len(schedule)))
        x, points = backbone.latents([seed], protocol.size), []
        for k in range(n):
            points.append(x)
            tau = schedule.tau[k].expand(1)
            conds: Sequence[Conditioning] = [self.empty, self.asked[[row]]]
            none, asked = predict_each(backbone, protocol, x, tau, conds)
            x = backbone.step(steer(backbone, protocol, none, asked), x, k, schedule)
        return torch.cat(points), schedule.tau[:n], row


def repelled(student: torch.Tensor, anchor: torch.Tensor, concept: torch.Tensor, *, eta: float, gamma: float) -> torch.Tensor:
    """Gamma times the mean of relu(|f - anchor| - eta |f - concept|) over a batch of predictions (b, ...)."""
    to_anchor, to_concept = ((student - other).float().flatten(1).norm(dim=1) for other in (anchor, concept))
    loss: torch.Tensor = gamma * (to_anchor - eta * to_concept).clamp_min(0).mean()
    return loss
