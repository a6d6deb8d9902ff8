"""ANT: the student follows the base in the early steps and turns away from the concept in the late ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.adapters import AdapterBank
from erasekit.backbone import Conditioning, concatenate
from erasekit.closedform import covariance
from erasekit.concepts import Concept
from erasekit.deltas import Deltas, LowRank, scale
from erasekit.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.method import Method, RunContext
from erasekit.sites import concept_prompts
from erasekit.training import Losses, TrainingConfig, train
from erasekit.trajectories import Pool, base_pool, with_guidance
from erasekit_ant import maths
from erasekit_ant.student import MaskedWeights

Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
POINTS = 8  # points of trajectories in a batch of those that fusion looks at


class AntConfig(TrainingConfig):
    """Settings of ANT."""

    form: Literal["single", "multi"] = Field(
        "multi", description="single: the most salient entries of all weights; multi: a LoRA per concept, then fusion"
    )
    tau0: float = Field(0.14, gt=0, lt=1, description="where the guidance turns, 0 is noise and 1 the picture")
    eta: float = Field(1.0, ge=0, description="how strong the guidance is, towards the concept early and away from it late")
    early_weight: float = Field(0.05, ge=0, description="weight of the early losses (the paper's alpha 1)")
    unconditional_weight: float = Field(0.5, ge=0, description="weight of the losses on the empty prompt (alpha 2)")
    guidance: float | None = Field(
        None, ge=0, description="classifier-free guidance of the trajectories trained on; left out, the protocol's"
    )
    lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW")
    batch: int = Field(4, ge=1, description="late points in a step, and early ones; each under two prompts")
    trajectories: int = Field(24, ge=1, description="trajectories of the base per concept")
    saliency: float = Field(0.5, gt=0, le=1, description="single: share of each weight with the largest gradients")
    saliency_draws: int = Field(4, ge=1, description="single: gradients whose masks are intersected")
    rank: int = Field(8, ge=1, description="multi: rank of each LoRA")
    scope: str = Field("kv", description="multi: linear layers that carry a LoRA, a scope of the backbone")
    lora_scale: float = Field(1.0, gt=0, description="multi: factor on the LoRAs before fusion")
    fusion_points: int = Field(64, ge=1, description="multi: points per concept at which fusion looks at the layers' inputs")
    fusion_preserve: float = Field(0.1, ge=0, description="multi: what drift on preserved prompts costs in fusion")
    fusion_ridge: float = Field(1e-4, gt=0, description="multi: ridge of the fusion, relative to the size of its system")


class Ant(Method):
    """ANT (ACM MM 2025), from the paper's equations: early and late are ends of the trajectory as the paper means them.

    The losses on the empty prompt have gradients, and the mask keeps the largest ones. `multi` on FLUX, where text has
    keys and values in the text stream, is an adaptation. An erasure holds matrices of linear layers only, so
    convolutions and biases are not trained.
    """

    name = "ant"
    Config = AntConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dit": {"scope": "add_kv", "early_weight": 0.0}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {
            "form": "single",
            "early_weight": 1.0,
            "lr": 5e-4,
            "steps": 250,
            "batch": 1,
            "warmup": 0,
            "guidance": 3.0,
            "tau0": 0.14,
        },
        "official-multi": {
            "form": "multi",
            "rank": 64,
            "lr": 5e-4,
            "steps": 10,
            "batch": 2,
            "warmup": 0,
            "guidance": 7.5,
            "tau0": 0.08,
            "early_weight": 2.5,
            "lora_scale": 4.3,
            "fusion_preserve": 2e-12,
        },
    }
    config: AntConfig

    def erase(self, ctx: RunContext) -> Erasure:
        """Train on the base's trajectories in one of the two forms."""
        pools = [self.pool(ctx, concept) for concept in ctx.concepts]
        if self.config.form == "single":
            entry = ctx.concepts[0].name if len(pools) == 1 else "shared"
            deltas = {entry: {"weights": self.single(ctx, pools)}}
        else:
            fused = self.fuse(ctx, pools, [self.lora(ctx, i, pool) for i, pool in enumerate(pools)])
            deltas = {concept.name: {"adapter": own} for concept, own in zip(ctx.concepts, fused, strict=True)}
        return Erasure.of(ctx, method=self.name, config=self.config.model_dump(), deltas=deltas)

    def pool(self, ctx: RunContext, concept: Concept) -> Pool:
        """Trajectories of the base under random training prompts of a concept.

        Raises:
            UsageError: none of the sampler's steps is late.
        """
        config, generator = self.config, ctx.generator(f"ant/pool/{concept.name}")
        prompts = concept_prompts(concept, ctx.prompts("erase"))
        seeds = torch.randint(2**31, (config.trajectories,), generator=generator).tolist()
        rows = torch.randint(len(prompts), (len(seeds),), generator=generator).tolist()
        cond = ctx.backbone.encode([prompts[row] for row in rows])
        pool = base_pool(ctx.backbone, with_guidance(ctx, config.guidance), cond, seeds)
        if not maths.late(pool.tau, config.tau0).any():
            raise UsageError(f"None of {ctx.protocol.steps} sampling steps is at tau >= {config.tau0}: lower 'method.tau0'.")
        return pool

    def losses(self, predict: Predict, pools: Sequence[Pool], nothing: Conditioning) -> Any:
        """The losses of a step as `train` asks for them; concepts take turns.

        L_late + alpha2 U_late + alpha1 (L_early + alpha2 U_early), where L holds the student's
        prediction for the concept at `maths.target`, and U the one for the empty prompt at the base's.
        """
        config = self.config
        ends = [[pool.at(mask) for mask in _ends(pool, config.tau0)] for pool in pools]

        def losses(batch: int, generator: torch.Generator) -> Losses:
            out = {}
            for name, pool, weight in zip(("late", "early"), ends[batch % len(ends)], (1.0, config.early_weight), strict=True):
                points = pool.sample(config.batch, generator)
                cond = concatenate([points.cond, nothing.repeat(config.batch)])
                concept, empty = predict(torch.cat([points.x] * 2), torch.cat([points.tau] * 2), cond).chunk(2)
                base_empty, base_concept = points.predictions.unbind(1)
                wanted = maths.target(base_concept, base_empty, points.tau, tau0=config.tau0, eta=config.eta)
                out[name] = weight * _error(concept, wanted)
                out[f"{name}_unconditional"] = weight * config.unconditional_weight * _error(empty, base_empty)
            return out

        return losses

    # Single

    def single(self, ctx: RunContext, pools: Sequence[Pool]) -> Deltas:
        """Train the salient entries of all linear layers."""
        student = MaskedWeights(ctx)
        losses = self.losses(student.predict, pools, ctx.backbone.encode([""]))
        student.mask = self.saliency(ctx, student, losses, len(pools))
        train(losses, list(student.change.values()), self.config, ctx=ctx, name="ant")
        return student.deltas()

    def saliency(self, ctx: RunContext, student: MaskedWeights, losses: Any, concepts: int) -> dict[str, torch.Tensor]:
        """The entries with the largest gradients of the late loss at the base, in every draw of some concept."""
        union = {name: torch.zeros_like(change, dtype=torch.bool) for name, change in student.change.items()}
        for turn in range(concepts):
            kept = {name: torch.ones_like(mask) for name, mask in union.items()}
            for draws in range(self.config.saliency_draws):
                late = losses(turn, ctx.generator(f"ant/saliency/{turn}/{draws}"))["late"]
                for name, gradient in zip(kept, torch.autograd.grad(late, list(student.change.values())), strict=True):
                    kept[name] &= maths.salient(gradient, self.config.saliency)
            for name, mask in kept.items():
                union[name] |= mask
        return union

    # Multi

    def lora(self, ctx: RunContext, index: int, pool: Pool) -> dict[str, LowRank]:
        """Train the LoRA of one concept, alone."""
        bank, name = AdapterBank(ctx.backbone), f"ant-{index}"
        targets = ctx.backbone.lora_targets(self.config.scope)
        bank.add(name, targets, self.config.rank, ctx.generator(f"ant/init/{index}"))
        try:
            losses = self.losses(ctx.predict, [pool], ctx.backbone.encode([""]))
            train(losses, bank.train_only(name), self.config, ctx=ctx, name=name)
            trained = scale(bank.deltas(name), self.config.lora_scale)
            return {layer: delta for layer, delta in trained.items() if isinstance(delta, LowRank)}
        finally:
            bank.remove()

    def fuse(self, ctx: RunContext, pools: Sequence[Pool], loras: Sequence[dict[str, LowRank]]) -> list[Deltas]:
        """The concepts' shares of one joint solve per layer; inputs are those that the base gives the layer."""
        kept = ctx.backbone.encode([*dict.fromkeys(p.text for p in ctx.prompts("preserve")), ""])
        own, preserve = [], []
        for i, pool in enumerate(pools):
            generator = ctx.generator(f"ant/fusion/{i}")
            points = pool.sample(self.config.fusion_points, generator)
            others = torch.randint(len(kept), (len(points.x),), generator=generator)
            own.append(_moments(ctx, loras[0], points, points.cond))
            preserve.append(_moments(ctx, loras[0], points, kept[others]))
        fused: list[Deltas] = [{} for _ in loras]
        for name in loras[0]:
            shares = maths.fuse(
                [deltas[name] for deltas in loras],
                [moments[name] for moments in own],
                torch.stack([moments[name] for moments in preserve]).mean(0),
                weight=self.config.fusion_preserve,
                ridge=self.config.fusion_ridge,
            )
            for deltas, share in zip(fused, shares, strict=True):
                deltas[name] = share
        return fused


@torch.no_grad()
def _moments(ctx: RunContext, layers: Iterable[str], points: Pool, cond: Conditioning) -> dict[str, torch.Tensor]:
    """E[x x^T] over the inputs of each layer at some points of trajectories, (in, in), float64, on the CPU."""
    modules = dict(ctx.backbone.denoiser.named_modules())
    sums: dict[str, torch.Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            moment = covariance(inputs[0].flatten(0, -2)).cpu()
            sums[name] = sums.get(name, torch.zeros_like(moment)) + moment * len(inputs[0]) / len(points.x)

        return hook

    hooks = [modules[name].register_forward_pre_hook(record(name)) for name in layers]
    try:
        for chunk in torch.arange(len(points.x)).split(POINTS):
            ctx.predict(points.x[chunk], points.tau[chunk], cond[chunk])
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _ends(pool: Pool, tau0: float) -> tuple[torch.Tensor, torch.Tensor]:
    late = maths.late(pool.tau, tau0)
    return late, ~late


def _error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction.float() - target.float()).square().mean()
