"""ESD: the student learns to predict for the concept what the base predicts away from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.concepts import Concept
from erasekit.config import Plan
from erasekit.erasure import Erasure
from erasekit.memory import GIB, LORA_GB, Footprint
from erasekit.method import Method, RunContext
from erasekit.training import Losses, TrainingConfig, squared_error, train
from erasekit.trajectories import Pool, concept_pool, negative_guidance
from erasekit_esd.student import Student, full, lora, matching, modules

# Both say so, though the code calls its eta 2.
PUBLISHED = {"variant": "auto", "anchor": "empty", "eta": 1.0, "guidance": 3.0, "batch": 1, "warmup": 0}

BYTES = 4 + 4 + 8 + 2  # for each weight that is trained whole: itself, gradient and moments in fp32, and once in bf16


class EsdConfig(TrainingConfig):
    """Settings of ESD."""

    variant: Literal["auto", "x", "x-strict", "u", "all"] = Field(
        "x",
        description="linear layers that are trained: x those that read text (cross-attention; on FLUX all attention), x-strict "
        "their keys and values, u all but x, all; auto is the paper's advice, u for objects and nudity and else x",
    )
    weights: Literal["full", "lora"] = Field("full", description="train whole weights or a LoRA")
    rank: int = Field(8, ge=1, description="rank of the LoRA")
    anchor: Literal["empty", "neutral"] = Field(
        "neutral", description="what the target starts from: the empty prompt (the paper's) or the concept's neutral word"
    )
    eta: float = Field(
        1.0, ge=0, description="how far the target is pushed away from the concept; what ESD's newer code calls eta is 1 more"
    )
    guidance: float | None = Field(
        None, ge=0, description="classifier-free guidance of the trajectories trained on; left out, the protocol's"
    )
    lr: float = Field(3e-4, gt=0, description="peak learning rate of AdamW")
    batch: int = Field(8, ge=1, description="points of trajectories in a step")
    trajectories: int = Field(24, ge=1, description="trajectories of the base per concept")


class Esd(Method):
    """ESD (arXiv:2303.07345). Several concepts take turns on one set of weights.

    The published `u` and `all` train convolutions and biases too; an erasure holds matrices of linear layers only.
    """

    name = "esd"
    Config = EsdConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dit": {"weights": "lora", "lr": 2e-4, "eta": 0.25}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": PUBLISHED | {"lr": 1e-5, "steps": 1000},
        "official": PUBLISHED | {"lr": 5e-5, "steps": 200},
        "flux": {"weights": "lora", "anchor": "empty", "eta": 1.0, "lr": 1e-4, "steps": 1400, "batch": 1, "warmup": 0},
    }
    config: EsdConfig

    def footprint(self, plan: Plan) -> Footprint:
        """Points of one concept."""
        config, trained = self.config, LORA_GB
        if config.weights == "full":
            sizes, family = plan.backbone.linears(plan.backbone_config), plan.backbone.capabilities.family
            names = matching(sizes, family, "all" if config.variant == "auto" else config.variant)
            trained = BYTES * sum(sizes[name] for name in names) / GIB
        return Footprint(rows=config.batch, trained_gb=trained)

    def erase(self, ctx: RunContext) -> Erasure:
        """Draw the base's trajectories, train the student on them, and keep what it added to the weights."""
        pools = [self.pool(ctx, concept) for concept in ctx.concepts]
        names = modules(ctx.backbone, self.variant(ctx.concepts))
        low_rank = self.config.weights == "lora"
        with lora(ctx, names, rank=self.config.rank) if low_rank else nullcontext(full(ctx, names)) as student:
            train(self.losses(student, pools), student.parameters, self.config, ctx=ctx, name="esd")
            deltas = student.deltas()
        entry = ctx.concepts[0].name if len(ctx.concepts) == 1 else "shared"
        return Erasure.of(ctx, method=self.name, config=self.config.model_dump(), deltas={entry: {"weights": deltas}})

    def variant(self, concepts: Sequence[Concept]) -> str:
        """The variant, chosen by the kinds of concepts where the settings leave it open, as the paper advises."""
        if self.config.variant != "auto":
            return self.config.variant
        return "u" if any(concept.kind in ("object", "nsfw") for concept in concepts) else "x"

    def pool(self, ctx: RunContext, concept: Concept) -> Pool:
        """Trajectories of the base under random training prompts of a concept; `predictions` holds the targets."""
        config, name, neutral = self.config, f"esd/pool/{concept.name}", self.config.anchor == "neutral"
        pool = concept_pool(ctx, concept, config.trajectories, name=name, guidance=config.guidance, neutral=neutral)
        none, full, anchor = (pool.predictions[:, k] for k in (0, 1, 2 if neutral else 0))
        return replace(pool, predictions=negative_guidance(anchor, full, none, config.eta)[:, None])

    def losses(self, student: Student, pools: Sequence[Pool]) -> Any:
        """The loss of a step as `train` asks for it: |f_student(x, tau, c) - target|^2; concepts take turns."""

        def losses(batch: int, generator: torch.Generator) -> Losses:
            points = pools[batch // self.config.accumulate % len(pools)].sample(self.config.batch, generator)
            return {"erase": squared_error(student.predict(points.x, points.tau, points.cond), points.predictions[:, 0])}

        return losses
