"""ESD: the student learns to predict for the concept what the base predicts away from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.backbones.memory import GIB, LORA_GB, Footprint
from erasekit.concepts import Concept
from erasekit.erasures.erasure import Erasure
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.method import Method, OrNone
from erasekit.methods.students import Student, lora, whole
from erasekit.methods.training import LoraTrainingConfig, Losses, squared_error, train
from erasekit.methods.trajectories import Pool, at_scale, concept_pool, negative_guidance
from erasekit_esd.layers import matching, modules

# What erased on validation prompts of the mini world. On flux-mini a style reaches the image by CLIP's pooled prompt as well,
# past attention: with the attentions' layers alone .66 of a style was left, with all layers .02.
MINI = {
    "variant": "x",
    "anchor": "neutral",
    "guidance": None,
    "batch": 8,
    "lr": 3e-4,
    "schedule": "cosine",
    "warmup": 10,
    "clip": 1.0,
}
# Nobody has published ESD for FLUX.1; these are the values that forks of its code have in common (LoRAs on attention, the
# model told a scale of 1 in training). The rank is ours.
FLUX = {"weights": "lora", "variant": "x", "told": 1.0, "lr": 1e-4, "steps": 1400}

BYTES = 4 + 4 + 8 + 2  # for each weight that is trained whole: itself, gradient and moments in fp32, and once in bf16


class EsdConfig(LoraTrainingConfig):
    """Settings of ESD.

    The defaults are the published code's (rohitgandikota/erasing, July 2025); the paper's own training is the preset `paper`.
    """

    variant: Literal["auto", "x", "x-strict", "u", "all"] = Field(
        "auto",
        description="linear layers that are trained: x those that read text (cross-attention; on FLUX all attention), x-strict "
        "their keys and values, u all but x, all; auto is the paper's advice, u for objects and nudity and else x",
    )
    weights: Literal["full", "lora"] = Field("full", description="train whole weights or a LoRA")
    rank: int = Field(8, ge=1, description="rank of the LoRA")
    anchor: Literal["empty", "neutral"] = Field(
        "empty", description="what the target starts from: the empty prompt (the paper's) or the concept's neutral word"
    )
    eta: float = Field(
        1.0, ge=0, description="how far the target is pushed away from the concept; what ESD's newer code calls eta is 1 more"
    )
    guidance: Annotated[float | None, OrNone] = Field(
        3.0, ge=0, description="classifier-free guidance of the trajectories trained on (published: 3); none, the protocol's"
    )
    told: Annotated[float | None, OrNone] = Field(
        None,
        ge=0,
        description="guidance scale that a model with embedded guidance is told for targets and student; none, the protocol's",
    )
    lr: float = Field(5e-5, gt=0, description="peak learning rate of AdamW (published: 5e-5 in the code, 1e-5 in the paper)")
    steps: int = Field(200, ge=0, description="training steps (published: 200 in the code, 1000 in the paper)")
    batch: int = Field(1, ge=1, description="points of trajectories in a step (published: 1)")
    trajectories: int = Field(
        24, ge=1, description="trajectories of the base per concept; the published code draws one for each step"
    )


class Esd(Method):
    """ESD (arXiv:2303.07345). Several concepts take turns on one set of weights.

    The published `u` and `all` train convolutions and biases too; an erasure holds matrices of linear layers only.
    """

    name = "esd"
    Config = EsdConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dit": FLUX,
        "sd15-mini": MINI,
        "flux-mini": MINI | {"told": None, "variant": "all", "lr": 5e-4, "steps": 200, "eta": 0.25},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": EsdConfig(trajectories=200).model_dump(),
        "paper": EsdConfig(trajectories=200, lr=1e-5, steps=1000).model_dump(),
        "flux": EsdConfig(**FLUX).model_dump(),
    }
    curves: ClassVar[Mapping[str, str]] = {
        "erase": "how far the prediction for the concept is from the base's, guided away from it",
    }
    config: EsdConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Points of one concept."""
        config, trained = self.config, LORA_GB
        if config.weights == "full":
            sizes, family = plan.backbone.linears(plan.backbone_config), plan.backbone.capabilities.family
            names = matching(sizes, family, self.variant(plan.concepts))
            trained = BYTES * sum(sizes[name] for name in names) / GIB
        return Footprint(rows=config.batch, trained_gb=trained)

    def erase(self, ctx: RunContext) -> Erasure:
        """Draw the base's trajectories, train the student on them, and keep what it added to the weights."""
        pools = [self.pool(ctx, concept) for concept in ctx.concepts]
        with self.student(ctx) as student:
            train(self.losses(student, pools), student.parameters, self.config, ctx=ctx, name="esd", predict=student.predict)
            deltas = student.deltas()
        entry = ctx.concepts[0].name if len(ctx.concepts) == 1 else "shared"
        return self.erasure(ctx, deltas={entry: {"weights": deltas}})

    def student(self, ctx: RunContext) -> AbstractContextManager[Student]:
        """The student, which predicts at the guidance scale that its targets are of."""
        config, layers = self.config, modules(ctx.backbone, self.variant(ctx.concepts))
        told = replace(ctx, protocol=at_scale(ctx.protocol, config.told))
        if config.weights == "full":
            return nullcontext(whole(told, layers))
        return lora(told, "esd", layers, config.rank, ctx.generator("esd/init"), init=config.init, alpha=config.alpha)

    def variant(self, concepts: Sequence[Concept]) -> str:
        """The variant, chosen by the kinds of concepts where the settings leave it open, as the paper advises."""
        if self.config.variant != "auto":
            return self.config.variant
        return "u" if any(concept.kind in ("object", "nsfw") for concept in concepts) else "x"

    def pool(self, ctx: RunContext, concept: Concept) -> Pool:
        """Trajectories of the base under random training prompts of a concept; `predictions` holds the targets."""
        config, name, neutral = self.config, f"esd/pool/{concept.name}", self.config.anchor == "neutral"
        scales = {"guidance": config.guidance, "told": config.told}
        pool = concept_pool(ctx, concept, config.trajectories, name=name, neutral=neutral, **scales)
        none, full, anchor = (pool.predictions[:, k] for k in (0, 1, 2 if neutral else 0))
        return replace(pool, predictions=negative_guidance(anchor, full, none, config.eta)[:, None])

    def losses(self, student: Student, pools: Sequence[Pool]) -> Any:
        """The loss of a step as `train` asks for it: |f_student(x, tau, c) - target|^2; concepts take turns."""

        def losses(batch: int, generator: torch.Generator) -> Losses:
            points = pools[batch // self.config.accumulate % len(pools)].sample(self.config.batch, generator)
            return {"erase": squared_error(student.predict(points.x, points.tau, points.cond), points.predictions[:, 0])}

        return losses
