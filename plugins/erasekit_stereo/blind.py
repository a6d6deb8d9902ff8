"""Half-drawn images of a concept, finished as something else whatever the words: a stage that hardens other methods' edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from erasekit.backbones.protocol import Backbone, Conditioning, concatenate
from erasekit.concepts import Concept
from erasekit.erasures.deltas import Deltas, merged, summed
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.images import draw, kept_images, noised
from erasekit.methods.prompts import concept_pairs
from erasekit.methods.training import LoraTrainingConfig, Losses, squared_error, train
from erasekit_stereo.words import learned, read

MINI = {"word_steps": 100, "word_lr": 2e-2, "blind_lr": 2e-3, "blind_steps": 120, "batch": 16}
SCOPES = {"unet": "all", "dit": "all_attn"}


class Blinding(BaseModel):
    """Settings of the stage; a method's own of the same name go before these. Nothing was chosen for real models."""

    model_config = ConfigDict(frozen=True)

    blind_rounds: int = Field(1, ge=0, description="how often words are learned and trained against")
    words: int = Field(2, ge=0, description="words in a round, for each concept")
    word_steps: int = Field(3000, ge=1, description="training steps of a word")
    word_lr: float = Field(5e-3, gt=0, description="rate of AdamW for a word")
    blind_steps: int = Field(1000, ge=1, description="training steps of a round")
    blind_lr: float = Field(1e-4, gt=0, description="peak rate of AdamW")
    blind_rank: int = Field(16, ge=1, description="rank of the LoRA of a round")
    blind_scope: str = Field(
        "", description="linear layers that carry it, a scope of the backbone; none: all, on FLUX all attention"
    )
    blind_until: float = Field(0.6, gt=0, le=1, description="progress up to which a half-drawn image is trained on")
    blind_images: int = Field(32, ge=1, description="images of the concept; three times as many of what is kept")
    batch: int = Field(4, ge=1, description="points of the concept and points of what is kept in a step, each")


@dataclass(frozen=True)
class Seen:
    """What a concept's training looks at.

    Attributes:
        concept: what is erased.
        asked: prompts that ask for it.
        others: conditionings that do not: the neutral prompts, and the empty one.
        shown: images of it by the base, x0 (n, ...).
        goals: of each what the base draws from the same noise for the neutral prompt.
        kept: images of what is kept, x0, and `prompts` of each.
    """

    concept: Concept
    asked: Conditioning
    others: Sequence[Conditioning]
    shown: torch.Tensor
    goals: torch.Tensor
    kept: torch.Tensor
    prompts: Conditioning


def robustify(ctx: RunContext, deltas: Mapping[str, Deltas], config: BaseModel) -> dict[str, Deltas]:
    """Train the denoiser not to finish the concept, whatever it is told: the component `blind` of the slot `robustify`.

    In each round words are learned that bring the concept back in the model with all deltas on. Then a LoRA is trained on
    noised images of the concept: under its prompts, the learned words, the neutral prompts and the empty one, the model is to
    predict the image that the base draws from the same noise for the neutral prompt. Noised images of what is kept, under
    their own prompts or the empty one, are held at the base's predictions.

    Args:
        ctx: the run.
        deltas: {concept: deltas of the base weights}; further names, e.g. of an adapter, count and stay as they are.
        config: the settings of the method that calls, of which those are used that `Blinding` has too.

    Returns:
        The deltas with the LoRAs added.
    """
    own = {name: getattr(config, name) for name in Blinding.model_fields if hasattr(config, name)}
    settings, total = Blinding(**(MINI if ctx.backbone.domain == "mini" else {}) | own), dict(deltas)
    for concept in ctx.concepts:
        seen = _seen(ctx, concept, settings)
        words: list[Conditioning] = []
        for k in range(settings.blind_rounds):
            together, name = summed(list(total.values())), f"blind/{concept.name}/{k}"
            how: dict[str, Any] = {"steps": settings.word_steps, "batch": min(4, settings.batch), "lr": settings.word_lr}
            with merged(ctx.backbone.denoiser, together):
                found = [learned(ctx, concept, seen.shown, name=f"{name}/{i}", **how) for i in range(settings.words)]
            words += [read(ctx, word, concept.templates) for word in found]
            trained = _trained(ctx, seen, words, together, settings, name)
            total[concept.name] = summed([total.get(concept.name, {}), trained])
    return total


def _seen(ctx: RunContext, concept: Concept, settings: Blinding) -> Seen:
    encode, n = ctx.backbone.encode, settings.blind_images
    asked, neutral = (encode(list(side)) for side in zip(*concept_pairs(concept, ctx.prompts("erase")), strict=True))
    seeds = torch.randint(2**31, (n,), generator=ctx.generator(f"blind/{concept.name}")).tolist()
    turns = torch.arange(n) % len(asked)
    kept, prompts = kept_images(ctx, 3 * n, f"blind/{concept.name}/kept")
    shown, goals = (draw(ctx, side[turns], seeds) for side in (asked, neutral))
    return Seen(concept, asked, [neutral, encode([""])], shown, goals, kept, prompts)


def _trained(
    ctx: RunContext, seen: Seen, words: Sequence[Conditioning], so_far: Deltas, settings: Blinding, name: str
) -> Deltas:
    """A LoRA on top of all deltas, trained against the words so far."""
    backbone, n = ctx.backbone, settings.batch
    schedule = backbone.schedule(ctx.protocol.steps, ctx.protocol.size)
    early, empty = schedule.tau[schedule.tau <= settings.blind_until], seen.others[-1]
    sides = [seen.asked, *seen.others, *words]

    def losses(batch: int, generator: torch.Generator) -> Losses:
        def pick(most: int) -> torch.Tensor:
            return torch.randint(most, (n,), generator=generator)

        i, tau = pick(len(seen.shown)), early[pick(len(early))]
        x = noised(ctx, seen.shown[i], tau, generator)
        target, rate = towards(backbone, x, seen.goals[i], tau)
        pools = [words if words and k % 2 else sides for k in range(n)]  # every second point is under a learned word
        told = [pool[int(k) % len(pool)] for pool, k in zip(pools, pick(2**20), strict=True)]
        cond = concatenate([side[[int(k) % len(side)]] for side, k in zip(told, pick(2**20), strict=True)])
        j, tau_kept = pick(len(seen.kept)), schedule.tau[pick(len(schedule))]
        x_kept = noised(ctx, seen.kept[j], tau_kept, generator)
        plain = torch.rand(n, generator=generator) < 0.3
        asked = concatenate([empty if plain[k] else seen.prompts[[int(j[k])]] for k in range(n)])
        with torch.no_grad(), bank.teacher():
            held = ctx.predict(x_kept, tau_kept, asked)
        both = ctx.predict(torch.cat([x, x_kept]), torch.cat([tau, tau_kept]), concatenate([cond, asked]))
        mine, kept = both.chunk(2)
        return {"blind": squared_error(mine * rate, target * rate), "preserve": squared_error(kept, held)}

    training = LoraTrainingConfig(steps=settings.blind_steps, lr=settings.blind_lr, warmup=10, clip=1.0, schedule="cosine")
    with AdapterBank(backbone) as bank:
        if so_far:
            bank.add_frozen("so far", so_far)
        layers = backbone.lora_targets(settings.blind_scope or SCOPES[backbone.capabilities.family])
        bank.add(name, layers, settings.blind_rank, ctx.generator(f"{name}/init"))
        train(losses, bank.train_only(name), training, ctx=ctx, name=name.replace("/", "-"))
        return bank.deltas(name)


def towards(backbone: Backbone, x: torch.Tensor, goal: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction at latents x under which the finished image is `goal`, and the rate of noise in x, (b, 1, ...)."""
    none, one = torch.zeros_like(x), torch.ones_like(x)
    rate = backbone.add_noise(none, one, tau)
    noise = (x - backbone.add_noise(goal, none, tau)) / rate
    return (noise if backbone.capabilities.prediction == "epsilon" else noise - goal), rate
