"""A denoiser that neither begins nor finishes a concept, whatever it is told: a stage that hardens other methods' edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.attacks.tokens import compose, on_cpu, random_tokens
from erasekit.attacks.tokens import words as spelled
from erasekit.backbones.memory import GIB, Footprint
from erasekit.backbones.protocol import Backbone, Conditioning, concatenate
from erasekit.concepts import Concept, without_article
from erasekit.erasures.deltas import Deltas, merged, summed
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.component import Component
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.images import draw, kept_images, noised
from erasekit.methods.prompts import concept_pairs
from erasekit.methods.training import LoraTrainingConfig, Losses, squared_error, train
from erasekit.safety import is_unsafe
from erasekit.settings import Settings
from erasekit_stereo.words import learned, read

MINI = {"word_steps": 100, "word_lr": 2e-2, "lr": 3e-3, "steps": 120, "batch": 16}
LENGTHS, SAID = range(12, 17), range(2, 9)  # tokens of a scrambled prompt, and words of the concept in it
BARE = 0.3  # of what is held, under the empty prompt
BYTES = 4 + 4 + 8  # for each number of a LoRA: itself, gradient and moments
SIDES = 2.5  # of a layer, one to four: their sum is so many times the root of its weights


class BlindConfig(Settings):
    """Settings of the stage; nothing was chosen for real models."""

    rounds: int = Field(1, ge=0, description="how often words are learned and trained against")
    words: int = Field(4, ge=0, description="words in a round, for each concept")
    word_steps: int = Field(3000, ge=1, description="training steps of a word")
    word_lr: float = Field(5e-3, gt=0, description="rate of AdamW for a word")
    scrambled: int = Field(256, ge=0, description="prompts of the concept's words among random tokens")
    steps: int = Field(1000, ge=1, description="training steps of a round")
    lr: float = Field(1e-4, gt=0, description="peak rate of AdamW")
    rank: int = Field(16, ge=1, description="rank of the LoRA of a round")
    scope: str = Field("all", description="linear layers that carry it, a scope of the backbone")
    seen_from: float = Field(0.25, ge=0, le=1, description="progress from which an image shows what it will be")
    repel: float = Field(1.0, ge=0, description="how far beyond the neutral words to aim before that")
    until: float = Field(0.6, gt=0, le=1, description="progress up to which a half-drawn image is trained on")
    images: int = Field(32, ge=1, description="images of the concept; three times as many of what is kept")
    preserve_scale: float = Field(3.0, ge=0, description="weight of what is kept")
    gone: float = Field(0.0, ge=0, lt=0.7, description="of what is held: images of neutral prompts, under the concept's")
    batch: int = Field(4, ge=1, description="points of the concept and points of what is kept in a batch, each")
    accumulate: int = Field(1, ge=1, description="batches whose mean gradient makes one step")


@dataclass(frozen=True)
class Seen:
    """What a concept's training looks at.

    Attributes:
        concept: what is erased.
        scrambled: prompts in which its words stand among random tokens; None without any.
        plain: its neutral words in its templates.
        shown: images of it by the base, x0 (n, ...).
        asked: the prompt of each.
        neutral: what takes the place of that prompt.
        goals: of each what the base draws from the same noise for the neutral prompt.
        kept: images of what is kept, x0, and `prompts` of each.
    """

    concept: Concept
    scrambled: Conditioning | None
    plain: Conditioning
    shown: torch.Tensor
    asked: Conditioning
    neutral: Conditioning
    goals: torch.Tensor
    kept: torch.Tensor
    prompts: Conditioning


class Blind(Component):
    """The stage `blind` of `robustify`: the denoiser learns neither to begin nor to finish the concept, whatever it is told.

    In each round words are learned that bring the concept back in the model with all deltas on. Then a LoRA is trained on
    noised images of the concept, mostly under the learned words and under its own words among random tokens, now and then
    under their own prompts, the neutral ones and the empty one. Before `seen_from` little is drawn yet: there the aim is what
    the base predicts for the neutral prompt, and `repel` times as far again from what it predicts for the concept's. After it
    the base would go on with what it sees, so the aim is the image that it draws from the same noise for the neutral prompt.
    Noised images of what is kept, under their own prompts or the empty one, are held at the base's predictions, and with
    `gone` those of the neutral prompts under the concept's: what plain prompts no longer draw does not come back.
    """

    Config = BlindConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {"gone": 0.25},  # without, plain prompts drew 2 of 10 hazards again; on flux-mini it let Ring-A-Bell through
        "sd15-mini": MINI,
        "flux-mini": MINI,
    }
    config: BlindConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Points of one concept and of what is kept, and the LoRA of a round."""
        layers = plan.backbone.linears(plan.backbone_config, self.config.scope)
        numbers = self.config.rank * SIDES * sum(n**0.5 for n in layers.values())
        return Footprint(rows=2 * self.config.batch if self.config.rounds else 0, trained_gb=BYTES * numbers / GIB)

    def rows(self, plan: Planned) -> float:
        """The words', the LoRA's, and those of images of the concept, of what takes its place and of what is kept."""
        own, passes = self.config, 2 if plan.backbone.capabilities.guidance == "cfg" else 1
        trained = own.words * own.word_steps * min(4, own.batch) + own.steps * own.accumulate * 2 * own.batch
        return 3.0 * own.rounds * trained + 5 * own.images * plan.protocol.steps * passes

    def __call__(self, ctx: RunContext, deltas: Mapping[str, Deltas], method: Settings) -> dict[str, Deltas]:
        """Add the LoRAs to the deltas.

        Args:
            ctx: the run.
            deltas: {concept: deltas of the base weights}; further names, e.g. of an adapter, count and stay as they are.
            method: the settings of the method that calls, of which none is used.
        """
        settings, total = self.config, dict(deltas)
        for concept in ctx.concepts:
            seen = _seen(ctx, concept, settings)
            words: list[Conditioning] = []
            for k in range(settings.rounds):
                together, name = summed(list(total.values())), f"blind/{concept.name}/{k}"
                how: dict[str, Any] = {"steps": settings.word_steps, "batch": min(4, settings.batch), "lr": settings.word_lr}
                with merged(ctx.backbone.denoiser, together):
                    found = [learned(ctx, concept, seen.shown, name=f"{name}/{i}", **how) for i in range(settings.words)]
                words += [read(ctx, word, concept.templates) for word in found]
                trained = _trained(ctx, seen, words, together, settings, name)
                total[concept.name] = summed([total.get(concept.name, {}), trained])
        return total


def _seen(ctx: RunContext, concept: Concept, settings: BlindConfig) -> Seen:
    encode, n, name = ctx.backbone.encode, settings.images, f"blind/{concept.name}"
    asked, neutral = (encode(list(side)) for side in zip(*concept_pairs(concept, ctx.prompts("erase")), strict=True))
    seeds = torch.randint(2**31, (n,), generator=ctx.generator(name)).tolist()
    whose = torch.linspace(0, len(asked) - 1, n).round().long()  # of all of the concept's words, also where they are many
    shown, goals = (draw(ctx, side[whose], seeds) for side in (asked, neutral))
    near = scrambled(ctx.backbone, concept, settings.scrambled, ctx.generator(f"{name}/scrambled"))
    kept, prompts = kept_images(ctx, 3 * n, f"{name}/kept", unasked=False)  # unasked, the base may draw the concept
    plain = encode([concept.neutralise(text) for text in concept.prompts()])
    return Seen(concept, near, plain, shown, asked[whose], neutral[whose], goals, kept, prompts)


@torch.no_grad()
def scrambled(backbone: Backbone, concept: Concept, n: int, generator: torch.Generator) -> Conditioning | None:
    """`n` prompts in which the words of a concept stand among random tokens, other ones for each text encoder; None for none.

    Attacks that search for tokens find such prompts. They are no language, so an edit fitted on sentences need not reach them.
    What erasekit refuses of a user is left out, so there may be fewer.
    """
    names, rows = [without_article(phrase) for phrase in concept.phrases], list[Conditioning]()
    like = backbone.encode([""])
    for _ in range(n):
        ids: dict[str, torch.Tensor] = {}
        for encoder in backbone.encoders:
            length, lexicon = _one_of(LENGTHS, generator), backbone.lexicon(encoder)
            said = torch.randperm(length, generator=generator) < _one_of(SAID, generator)
            own = [spelled(backbone, encoder, _one_of(names, generator)) for _ in range(length)]
            other = random_tokens(lexicon, length, generator).split(1)
            ids[encoder] = compose(backbone, encoder, [own[k] if said[k] else other[k] for k in range(length)]).ids
        if not any(is_unsafe(backbone.spell(encoder, own_ids[0])) for encoder, own_ids in ids.items()):
            rows.append(on_cpu(backbone.embed(ids, like=like)))
    return concatenate(rows) if rows else None


def _trained(
    ctx: RunContext, seen: Seen, words: Sequence[Conditioning], so_far: Deltas, settings: BlindConfig, name: str
) -> Deltas:
    """A LoRA on top of all deltas, trained against the words so far."""
    backbone, n = ctx.backbone, settings.batch
    schedule = backbone.schedule(ctx.protocol.steps, ctx.protocol.size)
    early, empty = schedule.tau[schedule.tau <= settings.until], backbone.encode([""])
    kinds = [of for of in (words, [seen.scrambled] if seen.scrambled else []) * 3 if of] + [None]

    def told(k: int, i: int, generator: torch.Generator) -> tuple[Conditioning, Conditioning]:
        """What the model is told at the k-th point of a step, which shows the image i, and what it should take it for."""
        of = kinds[k % len(kinds)]
        if of is None:
            return _one_of([seen.asked[[i]], seen.neutral[[i]], empty], generator), seen.neutral[[i]]
        return _any_row(_one_of(of, generator), generator), _any_row(seen.plain, generator)

    def still(i: int, j: int, which: float) -> tuple[torch.Tensor, Conditioning, Conditioning]:
        """An image that is to stay, what the model is told of it, and what it should take it for."""
        if which > 1 - settings.gone:
            return seen.goals[i], seen.asked[[i]], seen.neutral[[i]]
        prompt = empty if which < BARE else seen.prompts[[j]]
        return seen.kept[j], prompt, prompt

    def losses(batch: int, generator: torch.Generator) -> Losses:
        def pick(most: int) -> torch.Tensor:
            return torch.randint(most, (n,), generator=generator)

        i, tau, first = pick(len(seen.shown)), early[pick(len(early))], int(pick(len(kinds))[0])
        x = noised(ctx, seen.shown[i], tau, generator)
        cond, aims = zip(*(told(first + m, int(i[m]), generator) for m in range(n)), strict=True)
        j, tau_kept = pick(len(seen.kept)), schedule.tau[pick(len(schedule))]
        which = torch.rand(n, generator=generator)
        x0, asked, wanted = zip(*(still(int(i[m]), int(j[m]), float(which[m])) for m in range(n)), strict=True)
        x_kept = noised(ctx, torch.stack(x0), tau_kept, generator)
        places, progress = torch.cat([x, x_kept]), torch.cat([tau, tau_kept])
        with torch.no_grad(), bank.teacher():
            base, held = ctx.predict(places, progress, concatenate([*aims, *wanted])).chunk(2)
            away = base - ctx.predict(x, tau, seen.asked[i])
        finished, rate = towards(backbone, x, seen.goals[i], tau)
        little = tau.view(-1, *[1] * (x.ndim - 1)).to(x.device) < settings.seen_from
        target = torch.where(little, base + settings.repel * away, finished)
        mine, now = ctx.predict(places, progress, concatenate([*cond, *asked])).chunk(2)
        preserved = settings.preserve_scale * squared_error(now, held)
        return {"blind": squared_error(mine * rate, target * rate), "preserve": preserved}

    how = {"steps": settings.steps, "lr": settings.lr, "accumulate": settings.accumulate}
    training = LoraTrainingConfig(**how, warmup=10, clip=1.0, schedule="cosine")
    with AdapterBank(backbone) as bank:
        if so_far:
            bank.add_frozen("so far", so_far)
        layers = backbone.lora_targets(settings.scope)
        bank.add(name, layers, settings.rank, ctx.generator(f"{name}/init"))
        train(losses, bank.train_only(name), training, ctx=ctx, name=name.replace("/", "-"))
        return bank.deltas(name)


def towards(backbone: Backbone, x: torch.Tensor, goal: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction at latents x under which the finished image is `goal`, and the rate of noise in x, (b, 1, ...)."""
    none, one = torch.zeros_like(x), torch.ones_like(x)
    rate = backbone.add_noise(none, one, tau)
    noise = (x - backbone.add_noise(goal, none, tau)) / rate
    return (noise if backbone.capabilities.prediction == "epsilon" else noise - goal), rate


def _one_of(of: Sequence[Any], generator: torch.Generator) -> Any:
    return of[int(torch.randint(len(of), (1,), generator=generator))]


def _any_row(cond: Conditioning, generator: torch.Generator) -> Conditioning:
    return cond[torch.randint(len(cond), (1,), generator=generator)]
