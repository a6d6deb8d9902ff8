"""SPM (CVPR 2024): a rank-1 adapter that leads away from the concept, and changes nothing under random encodings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.backbones.memory import LORA_GB, Footprint
from erasekit.backbones.protocol import guided
from erasekit.concepts import Concept
from erasekit.erasures.deltas import Deltas
from erasekit.erasures.erasure import Erasure
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.method import Method, OrNone
from erasekit.methods.prompts import concept_pairs
from erasekit.methods.training import LoraTrainingConfig, Losses, squared_error, train
from erasekit.methods.trajectories import negative_guidance, predict_each, with_guidance
from erasekit_spm.anchors import random_anchors

BLOCKS = "blocks"
# Attention and feed-forward layers of the transformer blocks. Those that read time and pooled text alone (`norm`, on flows)
# have no counterpart in a UNet's.
LINEAR = {"unet": r"\battentions\.", "dit": r"transformer_blocks\.\d+\.(attn2?\.|ff|proj_)"}

# Chosen by predictions on validation prompts of one object, the cat. On sd15-mini they leave a style and the hazard whole, and
# a third of a person.
MINI: dict[str, Any] = {"steps": 80, "lr": 5e-3, "warmup": 5, "clip": 1.0, "bare": False, "anchor": "neutral", "eta": 0.25}
MINI |= {"anchors": 2, "batch": 4, "guidance": None}


class SpmConfig(LoraTrainingConfig):
    """Settings of SPM; the defaults are those of the published code (Con6924/SPM, 2023)."""

    steps: int = Field(3000, ge=0, description="training steps per concept, a trajectory of the student each (published: 3000)")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of AdamW (published: 1e-4)")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine",
        description="of the rate: it falls along a cosine to a twentieth, or stays (published: three cosines, each to 0)",
    )
    warmup: int = Field(500, ge=0, description="steps of linear warm-up (published: 500)")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW (published: 0.01)")
    rank: int = Field(1, ge=1, description="rank of the adapter (published: 1)")
    scope: str = Field(
        BLOCKS,
        description="linear layers that carry it: blocks are those of the transformer blocks (published), or a scope",
    )
    bare: bool = Field(True, description="train on the concept's words alone (published), not in its training prompts")
    anchor: Literal["empty", "neutral"] = Field(
        "empty", description="what the target starts from: the empty prompt (published) or the concept's neutral words"
    )
    eta: float = Field(1.0, ge=0, description="how far the target is pushed away from the concept (published: 1)")
    anchoring: float = Field(1000.0, ge=0, description="weight of the loss on random encodings (published: 1000)")
    anchors: int = Field(4, ge=1, description="random encodings for each point (published: 4)")
    batch: int = Field(1, ge=1, description="trajectories in a step, of each of which one point is trained (published: 1)")
    guidance: Annotated[float | None, OrNone] = Field(
        3.0, ge=0, description="classifier-free guidance of the student's trajectories (published: 3); none, the protocol's"
    )


class Spm(Method):
    """SPM (arXiv:2312.16145): semi-permeable adapters of rank 1, one for each concept, each trained on the base alone.

    The student follows a prompt of the concept to a random step of the sampler. At that point x the loss is
    |f(x, c) - (T(x, a) - eta (T(x, c) - T(x, a)))|^2 + anchoring |f(x, r) - T(x, r)|^2, with f the student, T the base, a the
    empty prompt and r random encodings: Gaussian, taken with the probability 1 - cos to c, at .8 to 1.2 of its norm.

    In the paper an adapter is multiplied, for each prompt, by how near the prompt is to the concept: by the cosine of their
    encodings or the share of the concept's tokens that it holds, whichever is larger (facilitated transport). A LoRA file has
    no such factor: loaded or merged it counts in full under every prompt, and what stays is held by the anchoring alone. The
    paper's figures for what stays are with the factor.

    An erasure holds linear layers only: the published adapters are also on the convolutions that lead into and out of a
    UNet's blocks. The published rate falls along three cosines after the warm-up, here along one, and images are of the
    protocol's size, not of random ones. The published run is in float32: in half precision the anchoring multiplies
    rounding errors too.

    Nobody has published SPM for FLUX.1. There the equations are used as they stand, with adapters on attention and
    feed-forward layers of all blocks, and each of a prompt's two encodings gets a random one of its own.
    """

    name = "spm"
    Config = SpmConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd15-mini": MINI,
        "flux-mini": MINI | {"lr": 1e-2, "anchoring": 100.0},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": SpmConfig().model_dump()}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {"without anchoring": {"anchoring": 0.0}}
    curves: ClassVar[Mapping[str, str]] = {
        "erase": "how far the prediction for the concept is from the base's, guided away from it",
        "anchor": "how far predictions under random encodings are from the base's, times `anchoring`",
    }
    config: SpmConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Points of one concept, under its prompts and under random encodings."""
        config = self.config
        prompts = 1 + (config.anchors if config.anchoring else 0)
        return Footprint(rows=prompts * config.batch if config.steps else 0, trained_gb=LORA_GB)

    def erase(self, ctx: RunContext) -> Erasure:
        """An adapter for each concept, trained with no other one on."""
        deltas = {concept.name: {"adapter": self.adapter(ctx, concept)} for concept in ctx.concepts}
        return self.erasure(ctx, deltas=deltas)

    def adapter(self, ctx: RunContext, concept: Concept) -> Deltas:
        """What the adapter of one concept adds to each layer."""
        config, name = self.config, concept.name
        with AdapterBank(ctx.backbone) as bank:
            start = ctx.generator(f"spm/init/{name}")
            bank.add(name, self.layers(ctx), config.rank, start, init=config.init, alpha=config.alpha)
            losses = Anchored(config, ctx, bank, concept)
            train(losses, bank.train_only(name), config, ctx=ctx, name=f"spm-{ctx.concepts.index(concept)}")
            return bank.deltas(name)

    def layers(self, ctx: RunContext) -> list[str]:
        """The linear layers that carry the adapter."""
        if self.config.scope != BLOCKS:
            return ctx.backbone.lora_targets(self.config.scope)
        pattern = LINEAR[ctx.backbone.capabilities.family]
        return [name for name in ctx.backbone.lora_targets("all") if re.search(pattern, name)]


class Anchored:
    """The losses of a step at random points of the student's own trajectories."""

    def __init__(self, config: SpmConfig, ctx: RunContext, bank: AdapterBank, concept: Concept) -> None:
        """Encode the concept's words or prompts, and what takes their place."""
        self.config, self.ctx, self.bank = config, ctx, bank
        words = [(phrase, concept.neutralise(phrase)) for phrase in concept.phrases]
        pairs = words if config.bare else concept_pairs(concept, ctx.prompts("erase"))
        self.asked, self.neutral = (ctx.backbone.encode(list(side)) for side in zip(*pairs, strict=True))
        self.empty = ctx.backbone.encode([""])
        self.protocol = with_guidance(ctx, config.guidance)

    def __call__(self, batch: int, generator: torch.Generator) -> Losses:
        """What leads away from the concept, and what holds predictions under random encodings."""
        config, predict = self.config, self.ctx.predict
        x, tau, rows = self.points(generator)
        asked = self.asked[rows]
        start = self.neutral[rows] if config.anchor == "neutral" else self.empty.repeat(len(x))
        many = torch.arange(len(x)).repeat_interleave(config.anchors)
        far = (x[many], tau[many], random_anchors(asked[many], generator)) if config.anchoring else None
        with torch.no_grad(), self.bank.teacher():
            neutral, concept = predict_each(self.ctx.backbone, self.protocol, x, tau, [start, asked])
            held = predict(*far) if far else None
        losses = {"erase": squared_error(predict(x, tau, asked), negative_guidance(neutral, concept, neutral, config.eta))}
        if far and held is not None:
            losses["anchor"] = config.anchoring * squared_error(predict(*far), held)
        return losses

    @torch.no_grad()
    def points(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents and progress at a random step of the student's trajectories, and whose prompts they follow."""
        backbone, protocol = self.ctx.backbone, self.protocol
        schedule = backbone.schedule(protocol.steps, protocol.size)
        rows, seeds = (torch.randint(n, (self.config.batch,), generator=generator) for n in (len(self.asked), 2**31))
        last = int(torch.randint(min(1, len(schedule) - 1), len(schedule), (1,), generator=generator))
        x, cond = backbone.latents(seeds.tolist(), protocol.size), self.asked[rows]
        for k in range(last):
            tau = schedule.tau[k].expand(len(x))
            followed = guided(backbone, x, tau, cond, uncond=self.empty, scale=protocol.guidance)
            x = backbone.step(followed, x, k, schedule)
        return x, schedule.tau[last].expand(len(x)), rows
