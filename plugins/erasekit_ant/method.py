"""ANT: the student follows the base in the early steps and turns away from the concept in the late ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.backbones.memory import GIB, LORA_GB, Footprint
from erasekit.backbones.protocol import Conditioning, Predict, concatenate
from erasekit.backbones.schedule import is_late
from erasekit.concepts import Concept
from erasekit.erasures.deltas import Deltas, LowRank
from erasekit.erasures.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.fusion import Read, fuse, input_moments
from erasekit.methods.method import Method, OrNone
from erasekit.methods.students import Student, masked
from erasekit.methods.training import LoraTrainingConfig, Losses, squared_error, train, train_lora
from erasekit.methods.trajectories import Pool, concept_pool
from erasekit_ant import maths

# For each weight that `single` trains: change, gradient, moments, mask, the changed weight, and that twice in bf16.
BYTES = 4 + 4 + 8 + 1 + 4 + 2 * 2


KEYS_AND_VALUES = {"unet": "kv", "dit": "add_kv"}  # scopes
# What erased on validation prompts of the mini world. On flux-mini a style reaches the image by CLIP's pooled prompt as well,
# past keys and values of text: with LoRAs on these alone .66 of a style was left, with all layers .21.
MINI = {
    "form": "multi",
    "early_weight": 0.05,
    "guidance": None,
    "batch": 4,
    "steps": 200,
    "lr": 2e-3,
    "schedule": "cosine",
    "warmup": 10,
    "clip": 1.0,
    "saliency_draws": 4,
}
# The published LoRAs are for a hundred concepts at once, and ten steps for each.
OURS = {
    "rank": 8,
    "alpha": None,
    "scope": "kv",
    "keys_and_values": False,
    "lora_scale": 1.0,
    "fusion_preserve": 0.1,
    "fusion_ridge": 1e-4,
    "fusion_points": 64,
}
# Nobody has published ANT for FLUX.1. Rate and steps are the published ones for Stable Diffusion, LoRAs stand for whole
# weights, which few machines can train. A flow model settles what is drawn in its first steps: of fifteen on flux-mini four
# lie before 0.14, so that it turns at 0.04 and there is next to nothing early.
FLUX = OURS | {"form": "multi", "scope": "add_kv", "early_weight": 0.0, "tau0": 0.04}
MULTI = {
    "form": "multi",
    "tau0": 0.08,
    "early_weight": 0.5,
    "unconditional_weight": 2.5,
    "guidance": 7.5,
    "composed": 7.5,
    "batch": 2,
    "steps": 10,
    "weight_decay": 0.01,
}


class AntConfig(LoraTrainingConfig):
    """Settings of ANT.

    The defaults are those of the published code (lileyang1210/ANT, July 2025) for nudity, `single`; what `multi` alone reads
    has the values published for a hundred people.
    """

    form: Literal["single", "multi"] = Field(
        "single", description="single: the most salient entries of all weights; multi: a LoRA per concept, then fusion"
    )
    tau0: float = Field(
        0.14,
        gt=0,
        lt=1,
        description="where the guidance turns, 0 is noise and 1 the image (published: 7/50, multi 4/50)",
    )
    eta: float = Field(1.0, ge=0, description="how strong the guidance is, towards the concept early and away from it late")
    early_weight: float = Field(1.0, ge=0, description="weight of the early losses (the paper's alpha 1; published: 1)")
    unconditional_weight: float = Field(
        0.5, ge=0, description="weight of the losses on the empty prompt (alpha 2; published: 0.5)"
    )
    guidance: Annotated[float | None, OrNone] = Field(
        3.0,
        ge=0,
        description="guidance of the trajectories trained on (published: 3, multi 7.5); none, the protocol's",
    )
    composed: float = Field(
        1.0,
        ge=0,
        description="guidance scale of the predictions for the concept that are compared (the paper's 1, multi's code 7.5)",
    )
    lr: float = Field(5e-4, gt=0, description="peak learning rate of AdamW (published: 5e-4)")
    steps: int = Field(250, ge=0, description="training steps (published: 250, multi 10 for each concept)")
    batch: int = Field(1, ge=1, description="late points in a step, and early ones (published: 1, multi 2)")
    trajectories: int = Field(
        24, ge=1, description="trajectories of the base per concept; the published code draws one for each step"
    )
    saliency: float = Field(0.5, gt=0, le=1, description="single: share of each weight that is trained (published: 0.5)")
    saliency_draws: int = Field(5, ge=1, description="single: gradients whose masks are intersected (published: five seeds)")
    rank: int = Field(64, ge=1, description="multi: rank of each LoRA (published: 64)")
    alpha: Annotated[float | None, OrNone] = Field(
        1.0, gt=0, description="alpha of the LoRAs, of which alpha/rank B A counts (published: 1); none, the rank"
    )
    scope: str = Field("all", description="multi: linear layers that carry a LoRA, a scope of the backbone (published: all)")
    keys_and_values: bool = Field(
        True, description="multi: of the LoRAs only those on keys and values of text are kept, as published; else all are"
    )
    lora_scale: float = Field(4.3, gt=0, description="multi: factor on the LoRAs before fusion (published: 4.3)")
    fusion_points: int = Field(64, ge=1, description="multi: points per concept at which fusion looks at the layers' inputs")
    fusion_preserve: float = Field(
        20.0, ge=0, description="multi: what drift on preserved prompts costs in fusion (published: 2e-12 times 1e13)"
    )
    fusion_ridge: float = Field(
        0.0, ge=0, description="multi: ridge of the fusion, relative to the size of its system (published: 0)"
    )


class Ant(Method):
    """ANT (ACM MM 2025), from the paper's equations: early and late are ends of the trajectory as the paper means them.

    The losses on the empty prompt have gradients, and the mask keeps the largest ones. `multi` on FLUX, where text has
    keys and values in the text stream, is an adaptation. An erasure holds matrices of linear layers only, so
    convolutions and biases are not trained. The preset `official-multi` has the weights with which the published code ran,
    which has alpha 1 and alpha 2 the other way round than its paper. Its cached captions count next to nothing, 2e-12 each.
    """

    name = "ant"
    Config = AntConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dit": FLUX,
        "sd15-mini": OURS | MINI,
        "flux-mini": MINI | {"early_weight": 0.0, "scope": "all", "steps": 100, "lr": 1e-3},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": AntConfig(trajectories=250).model_dump(),
        "official-multi": AntConfig(**MULTI).model_dump(),
    }
    curves: ClassVar[Mapping[str, str]] = {
        "late": "late in the trajectory: how far the prediction for the concept is from the base's, guided away from it",
        "early": "early in the trajectory: how far the prediction for the concept has moved from the base's",
        "late_unconditional": "late: how far the prediction for the empty prompt has moved from the base's",
        "early_unconditional": "early: how far the prediction for the empty prompt has moved from the base's",
    }
    config: AntConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Late and, where they count, early points, each under two prompts."""
        config = self.config
        ends = 2 if config.early_weight else 1
        trained = LORA_GB * len(plan.concepts)
        if config.form == "single":
            trained = BYTES * sum(plan.backbone.linears(plan.backbone_config).values()) / GIB
        return Footprint(rows=2 * ends * config.batch, trained_gb=trained)

    def erase(self, ctx: RunContext) -> Erasure:
        """Train on the base's trajectories in one of the two forms."""
        pools = [self.pool(ctx, concept) for concept in ctx.concepts]
        if self.config.form == "single":
            entry = ctx.concepts[0].name if len(pools) == 1 else "shared"
            deltas = {entry: {"weights": self.single(ctx, pools)}}
        else:
            fused = self.fuse(ctx, pools, [self.lora(ctx, i, pool) for i, pool in enumerate(pools)])
            deltas = {concept.name: {"adapter": own} for concept, own in zip(ctx.concepts, fused, strict=True)}
        return self.erasure(ctx, deltas=deltas)

    def pool(self, ctx: RunContext, concept: Concept) -> Pool:
        """Trajectories of the base under random training prompts of a concept.

        Raises:
            UsageError: none of the sampler's steps is late.
        """
        config, name = self.config, f"ant/pool/{concept.name}"
        pool = concept_pool(ctx, concept, config.trajectories, name=name, guidance=config.guidance)
        if not is_late(pool.tau, config.tau0).any():
            raise UsageError(f"None of {ctx.protocol.steps} sampling steps is at tau >= {config.tau0}: lower 'method.tau0'.")
        return pool

    def losses(self, predict: Predict, pools: Sequence[Pool], nothing: Conditioning) -> Any:
        """The losses of a step as `train` asks for them; concepts take turns.

        L_late + alpha2 U_late + alpha1 (L_early + alpha2 U_early), where L holds the student's
        prediction for the concept at `maths.target`, and U the one for the empty prompt at the base's. At a `composed` s
        other than 1 the prediction for the concept is f(0) + s (f(c) - f(0)), of the student and of the base alike.
        """
        config = self.config
        ends = [[pool.at(mask) for mask in _ends(pool, config.tau0)] for pool in pools]

        def losses(batch: int, generator: torch.Generator) -> Losses:
            out = {}
            for name, pool, weight in zip(
                ("late", "early"), ends[batch // config.accumulate % len(ends)], (1.0, config.early_weight), strict=True
            ):
                points = pool.sample(config.batch, generator)
                if not weight:
                    continue  # drawn all the same, so that a weight changes no other draw
                cond = concatenate([points.cond, nothing.repeat(config.batch)])
                concept, empty = predict(torch.cat([points.x] * 2), torch.cat([points.tau] * 2), cond).chunk(2)
                base_empty, base_concept = points.predictions.unbind(1)
                if config.composed != 1:
                    concept = torch.lerp(empty, concept, config.composed)
                    base_concept = torch.lerp(base_empty, base_concept, config.composed)
                wanted = maths.target(base_concept, base_empty, points.tau, tau0=config.tau0, eta=config.eta)
                out[name] = weight * squared_error(concept, wanted)
                out[f"{name}_unconditional"] = weight * config.unconditional_weight * squared_error(empty, base_empty)
            return out

        return losses

    # Single

    def single(self, ctx: RunContext, pools: Sequence[Pool]) -> Deltas:
        """Train the salient entries of all linear layers."""
        mask: dict[str, torch.Tensor] = {}
        student = masked(ctx, ctx.backbone.lora_targets("all"), mask)
        losses = self.losses(student.predict, pools, ctx.backbone.encode([""]))
        mask |= self.saliency(ctx, student, losses, len(pools))
        train(losses, student.parameters, self.config, ctx=ctx, name="ant", predict=student.predict)
        return student.deltas()

    def saliency(self, ctx: RunContext, student: Student, losses: Any, concepts: int) -> dict[str, torch.Tensor]:
        """The entries with the largest gradients of the late loss at the base, in every draw of some concept."""
        union = [torch.zeros_like(change, dtype=torch.bool) for change in student.parameters]
        for turn in range(concepts):
            kept = [torch.ones_like(mask) for mask in union]
            for draws in range(self.config.saliency_draws):
                late = losses(turn * self.config.accumulate, ctx.generator(f"ant/saliency/{turn}/{draws}"))["late"]
                for mask, gradient in zip(kept, torch.autograd.grad(late, student.parameters), strict=True):
                    mask &= maths.salient(gradient, self.config.saliency)
            for mask, found in zip(union, kept, strict=True):
                mask |= found
        return dict(zip(student.layers, union, strict=True))

    # Multi

    def lora(self, ctx: RunContext, index: int, pool: Pool) -> dict[str, LowRank]:
        """Train the LoRA of one concept, alone."""
        config, losses = self.config, self.losses(ctx.predict, [pool], ctx.backbone.encode([""]))
        layers, generator = ctx.backbone.lora_targets(config.scope), ctx.generator(f"ant/init/{index}")
        trained = train_lora(losses, layers, config.rank, config, ctx=ctx, name=f"ant-{index}", generator=generator)
        kept = (
            ctx.backbone.lora_targets(KEYS_AND_VALUES[ctx.backbone.capabilities.family]) if config.keys_and_values else layers
        )
        return {layer: LowRank(trained[layer].up * config.lora_scale, trained[layer].down) for layer in kept}

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
        drift = {layer: torch.stack([moments[layer] for moments in preserve]).mean(0) for layer in layers}
        reads = [Read([layer], [moments[layer] for moments in own], drift[layer]) for layer in layers]
        return fuse(loras, reads, ridge=config.fusion_ridge, preserve_scale=config.fusion_preserve)


def _ends(pool: Pool, tau0: float) -> tuple[torch.Tensor, torch.Tensor]:
    late = is_late(pool.tau, tau0)
    return late, ~late
