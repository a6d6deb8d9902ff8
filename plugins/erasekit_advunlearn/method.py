"""AdvUnlearn (NeurIPS 2024): the student is trained on prompts with the prefix that brings the concept back most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.attacks.tokens import Slots, compose, random_tokens, read_soft
from erasekit.backbones.memory import GIB, LORA_GB, Footprint
from erasekit.backbones.protocol import Conditioning
from erasekit.concepts import Concept
from erasekit.erasures.erasure import Erasure
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.method import Method, OrNone
from erasekit.methods.prompts import concept_pairs, preserve_prompts
from erasekit.methods.students import Student, lora, whole
from erasekit.methods.training import LoraTrainingConfig, Losses, squared_error, train
from erasekit.methods.trajectories import Pool, base_pool, negative_guidance, with_guidance

# Chosen on validation prompts, with an attack that is short enough for a laptop. On flux-mini the text stream's keys and
# values, trained whole, move other prompts half as far as all of attention does.
MINI: dict[str, Any] = {"anchor": "neutral", "guidance": None, "batch": 8, "kept_batch": 8, "lr": 5e-4, "schedule": "cosine"}
MINI |= {"clip": 1.0, "steps": 150, "warmup": 10, "plain_steps": 30, "attack_steps": 2, "attack_lr": 0.1, "retain": 3.0}
DRAWN: dict[str, Any] = {"trajectories": 200, "kept_trajectories": 1000}
BYTES = 4 + 4 + 8 + 2  # for each weight that is trained whole: itself, gradient and moments in fp32, and once in bf16


class AdvUnlearnConfig(LoraTrainingConfig):
    """Settings of AdvUnlearn; the defaults are those of the published code (OPTML-Group/AdvUnlearn, 2024)."""

    steps: int = Field(1000, ge=0, description="training steps (published: 1000)")
    lr: float = Field(1e-5, gt=0, description="peak learning rate of AdamW (published: 1e-5, of Adam)")
    batch: int = Field(1, ge=1, description="points of one prompt of the concept in a step (published: 1)")
    kept_batch: int = Field(5, ge=1, description="points of preserved prompts in a step (published: 5)")
    retain: float = Field(0.3, ge=0, description="weight of what is preserved (published: 0.3)")
    eta: float = Field(1.0, ge=0, description="how far the target is pushed away from the concept (published: 1)")
    anchor: Literal["empty", "neutral"] = Field(
        "empty", description="what the target starts from: the empty prompt (the paper's) or the concept's neutral words"
    )
    plain_steps: int = Field(200, ge=0, description="first steps, without an attack (published: 200)")
    attack_steps: int = Field(
        30, ge=1, description="steps of the attack in a training step (published: 30; the paper's fast variant 1)"
    )
    attack_lr: float = Field(1e-3, gt=0, description="size of each, along the sign of the gradient (published: 1e-3)")
    tokens: int = Field(1, ge=1, description="tokens of the prefix (published: 1)")
    scope: str = Field("kv", description="linear layers that are trained, a scope of the backbone")
    weights: Literal["full", "lora"] = Field("full", description="train whole weights or a LoRA")
    rank: int = Field(8, ge=1, description="rank of the LoRA")
    guidance: Annotated[float | None, OrNone] = Field(
        3.0, ge=0, description="classifier-free guidance of the trajectories trained on (published: 3); none, the protocol's"
    )
    trajectories: int = Field(24, ge=1, description="trajectories per concept; the published code draws one for each step")
    kept_trajectories: int = Field(64, ge=1, description="trajectories of preserved prompts; the published code: five a step")


@dataclass(frozen=True)
class Asked:
    """A concept's prompts, each with room for a prefix, and points of the base's trajectories under them.

    Attributes:
        cond: the prompts as they are.
        slots: of each prompt, {text encoder: the prompt after the slots of a prefix}.
        pool: `predictions` holds f(c) and the target.
    """

    cond: Conditioning
    slots: Sequence[Mapping[str, Slots]]
    pool: Pool


class AdvUnlearn(Method):
    """AdvUnlearn (arXiv:2405.15234). Several concepts take turns on one set of weights.

    In each step an attack looks for vectors before a prompt under which the student predicts what the base predicts for the
    concept: min |f(x, c') - f_base(x, c)|^2 by signed gradients (Madry et al. 2018). With them before it the student is trained
    as in ESD, to predict f_base(0) - eta (f_base(c) - f_base(0)), and on preserved prompts to predict what the base does. The
    published code gives Adam the sum of the gradients so far in place of a sign, and draws another point for each step of the
    attack; here the attack meets the points that the step then trains on.

    The paper trains the text encoder; an erasure holds weights of the denoiser, so that here those that read text are trained
    (keys and values), which the paper compares with. It has no form for flows: the equations are used as they stand.
    """

    name = "advunlearn"
    Config = AdvUnlearnConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dit": {"weights": "lora", "scope": "qk_dual", "lr": 1e-4},
        "sd15-mini": MINI,
        "flux-mini": MINI | {"weights": "full", "scope": "add_kv"},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": AdvUnlearnConfig(**DRAWN).model_dump(exclude={"scope", "weights"}),
        "fast": AdvUnlearnConfig(**DRAWN, attack_steps=1).model_dump(exclude={"scope", "weights"}),
    }
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "without attacks": {"plain_steps": 1_000_000},
        "without retaining": {"retain": 0.0},
    }
    curves: ClassVar[Mapping[str, str]] = {
        "erase": "how far the prediction for the concept, under the prefix that was found, is from the target",
        "retain": "how far predictions for preserved prompts have moved from the base's",
    }
    config: AdvUnlearnConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Points of one concept beside those of preserved prompts."""
        config, trained = self.config, LORA_GB
        if config.weights == "full":
            trained = BYTES * sum(plan.backbone.linears(plan.backbone_config, config.scope).values()) / GIB
        return Footprint(rows=config.batch + config.kept_batch if config.steps else 0, trained_gb=trained)

    def erase(self, ctx: RunContext) -> Erasure:
        """Draw the base's trajectories, train the student on them, and keep what it added to the weights."""
        asked, kept = [self.asked(ctx, concept) for concept in ctx.concepts], self._kept(ctx)
        with self._student(ctx) as student:
            losses = partial(self.losses, ctx, student, asked, kept)
            train(losses, student.parameters, self.config, ctx=ctx, name="advunlearn")
            deltas = student.deltas()
        entry = ctx.concepts[0].name if len(ctx.concepts) == 1 else "shared"
        return self.erasure(ctx, deltas={entry: {"weights": deltas}})

    def asked(self, ctx: RunContext, concept: Concept) -> Asked:
        """The prompts of a concept with points of the base."""
        backbone, config = ctx.backbone, self.config
        pairs, seeds = self._drawn(ctx, concept.name, concept_pairs(concept, ctx.prompts("erase")), config.trajectories)
        prompts, neutral = (list(side) for side in zip(*pairs, strict=True))
        cond, anchor = backbone.encode(prompts), backbone.encode(neutral)
        pool = base_pool(backbone, with_guidance(ctx, config.guidance), cond, seeds, [anchor])
        none, full, neutral_words = pool.predictions.unbind(1)
        goal = negative_guidance(neutral_words if config.anchor == "neutral" else none, full, none, config.eta)
        slots = [{name: compose(backbone, name, [config.tokens, text]) for name in backbone.encoders} for text in prompts]
        return Asked(cond, slots, replace(pool, predictions=torch.stack([full, goal], 1)))

    def losses(self, ctx: RunContext, student: Student, asked: Sequence[Asked], kept: Pool, batch: int, g: Any) -> Losses:
        """The loss of a step: that of ESD under the prefix that the attack finds, and what is preserved."""
        config = self.config
        step = batch // config.accumulate
        own = asked[step % len(asked)]
        rows = own.pool.row.unique()
        row = int(rows[torch.randint(len(rows), (1,), generator=g)])
        at, keep = own.pool.sample(config.batch, g, own.pool.row == row), kept.sample(config.kept_batch, g)
        cond = own.cond[[row]]
        if step >= config.plain_steps:
            cond = self.attack(ctx, student, own.slots[row], at, cond, g)
        erased = student.predict(at.x, at.tau, cond.repeat(config.batch))
        moved = student.predict(keep.x, keep.tau, keep.cond)
        retain = config.retain * squared_error(moved, keep.predictions[:, 1])
        return {"erase": squared_error(erased, at.predictions[:, 1]), "retain": retain}

    def attack(
        self, ctx: RunContext, student: Student, slots: Mapping[str, Slots], at: Pool, like: Conditioning, g: torch.Generator
    ) -> Conditioning:
        """The prompt with the prefix under which the student predicts most nearly what the base does for the concept."""
        vectors = {}
        for name, own in slots.items():
            start = own.lexicon.vectors[random_tokens(own.lexicon, len(own.at), g)]
            vectors[name] = start.float().clone().requires_grad_()
        for _ in range(self.config.attack_steps):
            cond = read_soft(ctx.backbone, [slots], [vectors], like).repeat(len(at))
            loss = squared_error(student.predict(at.x, at.tau, cond), at.predictions[:, 0])
            for vector, slope in zip(vectors.values(), torch.autograd.grad(loss, list(vectors.values())), strict=True):
                vector.data -= self.config.attack_lr * slope.sign()
        with torch.no_grad():
            return read_soft(ctx.backbone, [slots], [vectors], like)

    def _kept(self, ctx: RunContext) -> Pool:
        """Points of the base under preserved prompts."""
        prompts, seeds = self._drawn(ctx, "", preserve_prompts(ctx), self.config.kept_trajectories)
        return base_pool(ctx.backbone, with_guidance(ctx, self.config.guidance), ctx.backbone.encode(prompts), seeds)

    def _drawn(self, ctx: RunContext, name: str, prompts: Sequence[Any], n: int) -> tuple[list[Any], list[int]]:
        """At most `n` of the prompts, at random, and the seeds of `n` trajectories that take turns between them."""
        generator = ctx.generator(f"advunlearn/{name}")
        order = torch.randperm(len(prompts), generator=generator)[:n].tolist()
        return [prompts[k] for k in order], torch.randint(2**31, (n,), generator=generator).tolist()

    def _student(self, ctx: RunContext) -> AbstractContextManager[Student]:
        config, layers = self.config, ctx.backbone.lora_targets(self.config.scope)
        if config.weights == "full":
            return nullcontext(whole(ctx, layers))
        drawn = ctx.generator("advunlearn/init")
        return lora(ctx, "advunlearn", layers, config.rank, drawn, init=config.init, alpha=config.alpha)
