"""TRACE's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from erasekit.methods.closedform import RANK_ERROR
from erasekit.methods.method import OneOrSeveral
from erasekit.methods.training import TrainingConfig


class TraceConfig(TrainingConfig):
    """Settings of TRACE. Each slot names a registered component."""

    steps: int = Field(1000, ge=0, description="training steps for each concept (paper: 1000 to 2000); 0 leaves stage 2 out")
    refine: str = Field("uce", description="stage 1: uce, whitened, eq1, delta, none or a registered one")
    eta: float | None = Field(None, ge=0, le=1, description="damping of stage 1; left out, it is chosen on validation prompts")
    near_words: int = Field(
        16, ge=0, description="most other words for a concept, named by the model's own text encoder, that are erased with it"
    )
    e_u: Literal["neutral", "end"] = Field(
        "neutral",
        description="eq1, delta: what takes the place of the concept's vector: the neutral words', or the end token",
    )
    ridge: float = Field(1e-3, ge=0, description="ridge of the closed form, relative to the size of its system")
    preserve_scale: float = Field(
        1.0, ge=0, description="weight of the preserved prompts: against captions in whitened, against the concept's in uce"
    )
    caption_scale: float = Field(0.01, ge=0, description="uce: weight of captions of all kinds against the concept's prompts")
    fix_neutral: bool = Field(True, description="hold the neutral embeddings fixed as well")
    rank_error: float = Field(
        RANK_ERROR, ge=0, lt=1, description="what a lower rank of stage 1 may cost, relative, root mean square"
    )
    window: str = Field(
        "late", description="which part of the trajectory is trained: late, full, early, soft or a registered one"
    )
    tau0: float = Field(0.15, ge=0, le=1, description="share of the sampler's steps before the window")
    early_anchor: bool = Field(False, description="before tau0, hold the concept prompts at the teacher (ANT); undoes stage 1")
    bank: str = Field("per-concept", description="LoRAs: per-concept, shared or a registered one")
    rank: int = Field(4, ge=1, description="rank of each LoRA (paper: 4)")
    scope: str = Field("kv", description="linear layers that carry a LoRA, a scope of the backbone")
    eta_neg: float = Field(0.0, ge=0, description="how far the target is pushed away from the concept")
    preserve: float = Field(1.0, ge=0, description="weight of the preservation loss")
    preserve_early: float = Field(1.0, ge=0, description="how much more drift costs in the early steps")
    integration: Literal["pairs", "none"] = Field("pairs", description="the loss on prompts that hold two erased concepts")
    integration_every: int = Field(4, ge=1, description="steps between integration losses")
    integration_weight: float = Field(0.1, ge=0, description="weight of the integration loss")
    divergence: OneOrSeveral = Field((), description="further divergences, on the one-step x0: probe, clip, lpips")
    divergence_every: int = Field(4, ge=1, description="steps between them")
    divergence_weight: float = Field(0.05, ge=0, description="their weight")
    batch: int = Field(4, ge=1, description="concept points and clean points in a step, each (paper: 4)")
    trajectories: int = Field(32, ge=1, description="teacher trajectories per concept")
    clean_trajectories: int = Field(96, ge=1, description="teacher trajectories of clean prompts")
    robustify: OneOrSeveral = Field((), description="registered stages that harden the text sites at the end, e.g. rece")
