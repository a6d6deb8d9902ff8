"""ANT: the student follows the base in the early steps and turns away from the concept in the late ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.backbone import Conditioning, concatenate
from erasekit.concepts import Concept
from erasekit.config import Plan
from erasekit.deltas import Deltas, LowRank
from erasekit.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.fusion import fusion, input_moments, share
from erasekit.memory import GIB, LORA_GB, Footprint
from erasekit.method import Method, RunContext
from erasekit.training import Losses, TrainingConfig, squared_error, train, train_lora
from erasekit.trajectories import Pool, concept_pool
from erasekit_ant import maths
from erasekit_ant.student import MaskedWeights

# For each weight that `single` trains: change, gradient, moments, mask, the changed weight, and that twice in bf16.
BYTES = 4 + 4 + 8 + 1 + 4 + 2 * 2
Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


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
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # A flow model settles what is drawn in its first steps: of fifteen on flux-mini four lie before 0.14.
        "dit": {"scope": "add_kv", "early_weight": 0.0, "tau0": 0.04}
    }
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

    def footprint(self, plan: Plan) -> Footprint:
        """Late and early points, each under two prompts."""
        config = self.config
        trained = LORA_GB * len(plan.concepts)
        if config.form == "single":
            trained = BYTES * sum(plan.backbone.linears(plan.backbone_config).values()) / GIB
        return Footprint(rows=4 * config.batch, trained_gb=trained)

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
        config, name = self.config, f"ant/pool/{concept.name}"
        pool = concept_pool(ctx, concept, config.trajectories, name=name, guidance=config.guidance)
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
            for name, pool, weight in zip(
                ("late", "early"), ends[batch // config.accumulate % len(ends)], (1.0, config.early_weight), strict=True
            ):
                points = pool.sample(config.batch, generator)
                cond = concatenate([points.cond, nothing.repeat(config.batch)])
                concept, empty = predict(torch.cat([points.x] * 2), torch.cat([points.tau] * 2), cond).chunk(2)
                base_empty, base_concept = points.predictions.unbind(1)
                wanted = maths.target(base_concept, base_empty, points.tau, tau0=config.tau0, eta=config.eta)
                out[name] = weight * squared_error(concept, wanted)
                out[f"{name}_unconditional"] = weight * config.unconditional_weight * squared_error(empty, base_empty)
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
                late = losses(turn * self.config.accumulate, ctx.generator(f"ant/saliency/{turn}/{draws}"))["late"]
                for name, gradient in zip(kept, torch.autograd.grad(late, list(student.change.values())), strict=True):
                    kept[name] &= maths.salient(gradient, self.config.saliency)
            for name, mask in kept.items():
                union[name] |= mask
        return union

    # Multi

    def lora(self, ctx: RunContext, index: int, pool: Pool) -> dict[str, LowRank]:
        """Train the LoRA of one concept, alone."""
        config, losses = self.config, self.losses(ctx.predict, [pool], ctx.backbone.encode([""]))
        layers, init = ctx.backbone.lora_targets(config.scope), ctx.generator(f"ant/init/{index}")
        trained = train_lora(losses, layers, config.rank, config, ctx=ctx, name=f"ant-{index}", init=init)
        return {layer: LowRank(delta.up * config.lora_scale, delta.down) for layer, delta in trained.items()}

    def fuse(self, ctx: RunContext, pools: Sequence[Pool], loras: Sequence[dict[str, LowRank]]) -> list[Deltas]:
        """The concepts' shares of one joint solve per layer; inputs are those that the base gives the layer."""
        config, layers = self.config, list(loras[0])
        kept = ctx.backbone.encode([*dict.fromkeys(p.text for p in ctx.prompts("preserve")), ""])
        own, preserve = [], []
        for i, pool in enumerate(pools):
            generator = ctx.generator(f"ant/fusion/{i}")
            points = pool.sample(config.fusion_points, generator)
            others = torch.randint(len(kept), (len(points.x),), generator=generator)
            own.append(input_moments(ctx, layers, points.x, points.tau, points.cond))
            preserve.append(input_moments(ctx, layers, points.x, points.tau, kept[others]))
        fused: list[Deltas] = [{} for _ in loras]
        for layer in layers:
            drift = torch.stack([moments[layer] for moments in preserve]).mean(0)
            mine = [moments[layer] for moments in own]
            maps = fusion(mine, drift, ridge=config.fusion_ridge, preserve_scale=config.fusion_preserve)
            for shares, deltas, k_II in zip(fused, loras, maps, strict=True):
                shares[layer] = share([deltas[layer]], k_II)
        return fused


def _ends(pool: Pool, tau0: float) -> tuple[torch.Tensor, torch.Tensor]:
    late = maths.late(pool.tau, tau0)
    return late, ~late
