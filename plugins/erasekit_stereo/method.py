"""STEREO (CVPR 2025): search thoroughly for words that bring an erased concept back, then robustly erase all of them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.backbones.memory import GIB, LORA_GB, Footprint
from erasekit.backbones.protocol import Conditioning
from erasekit.concepts import Concept
from erasekit.erasures.deltas import Deltas, merged, summed
from erasekit.erasures.erasure import Erasure
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.images import images_of
from erasekit.methods.method import Method, OrNone
from erasekit.methods.prompts import concept_pairs
from erasekit.methods.students import Student, lora, whole
from erasekit.methods.training import LoraTrainingConfig, Losses, squared_error, train
from erasekit.methods.trajectories import Pool, base_pool, negative_guidance, with_guidance
from erasekit_stereo.words import learned, read

NO_TEXT = "no-text"
TEXT = {"unet": "cross", "dit": "all_attn"}  # the scope of the layers that read text
# Chosen on validation prompts. Nothing is preserved, so that what is trained decides how far the rest moves: keys and values of
# text less than all of cross-attention (sd15-mini) or of attention (flux-mini). All words take turns in the last erasing: with
# two learned ones a third of 150 steps was left for the concept's own, and half of the concept.
MINI: dict[str, Any] = {"scope": "kv", "guidance": None, "batch": 8, "steps": 300, "lr": 5e-4, "search_lr": 5e-4}
MINI |= {"schedule": "cosine", "warmup": 10, "clip": 1.0, "anchor": "neutral", "keep": 0.0, "push": 1.0}
MINI |= {"loops": 1, "images": 16, "word_steps": 100, "word_lr": 2e-2}
MINI_FLUX = {"weights": "full", "scope": "add_kv", "steps": 150, "lr": 2e-4, "search_lr": 2e-4, "push": 0.3}
BYTES = 4 + 4 + 8 + 2  # for each weight that is trained whole: itself, gradient and moments in fp32, and once in bf16


class StereoConfig(LoraTrainingConfig):
    """Settings of STEREO; the defaults are those of the published code (koushiksrivats/robust-concept-erasing, 2025)."""

    loops: int = Field(2, ge=0, description="how often the concept is erased and a word for it learned (published: 2 to 4)")
    steps: int = Field(200, ge=0, description="training steps of each erasing (published: 200)")
    lr: float = Field(2e-5, gt=0, description="peak learning rate of the last erasing (published: 2e-5)")
    search_lr: float = Field(5e-6, gt=0, description="the same of those in the loops (published: 5e-6)")
    batch: int = Field(1, ge=1, description="points of trajectories in a step, and images in one of a word (published: 1)")
    scope: str = Field(
        NO_TEXT, description="linear layers that are trained: no-text are all that do not read text (published), or a scope"
    )
    weights: Literal["full", "lora"] = Field("full", description="train whole weights or a LoRA")
    rank: int = Field(8, ge=1, description="rank of the LoRA")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW (published: 0.01)")
    eta: float = Field(
        0.0, ge=0, description="in the loops, how far the target is pushed away from the word (published code: 0; the paper: 1)"
    )
    anchor: Literal["empty", "neutral"] = Field(
        "empty", description="what targets start from: the empty prompt (the paper's) or the concept's neutral words"
    )
    keep: float = Field(1.0, ge=0, description="in the last target, weight of a sentence that holds the concept (published: 1)")
    push: float = Field(
        3.0, ge=0, description="in the last target, weight of the words that it is led away from (published: 3)"
    )
    guidance: Annotated[float | None, OrNone] = Field(
        3.0, ge=0, description="classifier-free guidance of the trajectories trained on (published: 3); none, the protocol's"
    )
    trajectories: int = Field(
        24, ge=1, description="trajectories per word; the published code draws one of the student's for each step"
    )
    images: int = Field(200, ge=1, description="images of the concept that words are learned from (published: about 500)")
    word_steps: int = Field(3000, ge=1, description="training steps of a word (published: 3000)")
    word_lr: float = Field(5e-3, gt=0, description="rate of AdamW for a word (published: 5e-3)")


@dataclass
class Hunted:
    """A concept, and all that has been found to ask for it.

    Attributes:
        concept: what is erased.
        sentences: prompts that ask for it in its own words.
        words: its own words alone, then each that was learned, one prompt each.
        prompts: of each of these, the prompts that it is erased in: first the sentences, then the learned word in templates.
        neutral: the sentences without the concept.
        filled: the templates with its neutral words.
        examples: images of it by the base, x0 (n, ...).
    """

    concept: Concept
    sentences: Conditioning
    words: list[Conditioning]
    prompts: list[Conditioning]
    neutral: Conditioning
    filled: Conditioning
    examples: torch.Tensor = field(repr=False)


class Stereo(Method):
    """STEREO (arXiv:2408.16807) for any number of concepts, which take turns.

    Each loop trains the model to predict f(0) - eta (f(w) - f(0)) for the last word w, from the model of the loop before, and
    learns another word that still draws the concept. Then the base is trained once: for each word to predict
    f(0) + keep (f(a) - f(0)) - push mean_w (f(w) - f(0)), where a is a sentence that holds the concept, so that the scene stays
    when the words go. The published code's negative guidance of 2 starts from f(w), so that in its loops eta is 0, and its APG
    changes nothing at its own settings. It trains on the student's trajectories; here they are the base's. It has no form for
    flows: the equations are used as they stand.
    """

    name = "stereo"
    Config = StereoConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dit": {"weights": "lora", "scope": "qk_dual", "lr": 1e-4, "search_lr": 1e-4},
        "sd15-mini": MINI,
        "flux-mini": MINI | MINI_FLUX,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": StereoConfig(trajectories=200).model_dump()}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {"without words": {"loops": 0}}
    curves: ClassVar[Mapping[str, str]] = {
        "erase": "how far the prediction for the concept, or for a word that brings it back, is from the target",
    }
    config: StereoConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Points of one concept."""
        trained = LORA_GB
        if self.config.weights == "full":
            trained = BYTES * sum(plan.backbone.linears(plan.backbone_config, self.config.scope).values()) / GIB
        return Footprint(rows=self.config.batch, trained_gb=trained)

    def erase(self, ctx: RunContext) -> Erasure:
        """The loops, then one erasing of all that they have found."""
        hunted = [self.begin(ctx, concept) for concept in ctx.concepts]
        found: Deltas = {}
        for loop in range(self.config.loops):
            with merged(ctx.backbone.denoiser, found):
                pools = [self._search_pool(ctx, own, loop) for own in hunted]
                step = self._trained(ctx, pools, f"stereo-{loop}", self.config.search_lr)
            found = summed([found, step])
            with merged(ctx.backbone.denoiser, found):
                for own in hunted:
                    self.hunt(ctx, own, loop)
        pools = [pool for own in hunted for pool in self.last_pools(ctx, own)]
        deltas = self._trained(ctx, pools, "stereo", self.config.lr)
        entry = ctx.concepts[0].name if len(ctx.concepts) == 1 else "shared"
        return self.erasure(ctx, deltas={entry: {"weights": deltas}})

    def layers(self, ctx: RunContext) -> list[str]:
        """The linear layers that are trained."""
        if self.config.scope != NO_TEXT:
            return ctx.backbone.lora_targets(self.config.scope)
        text = set(ctx.backbone.lora_targets(TEXT[ctx.backbone.capabilities.family]))
        return [name for name in ctx.backbone.lora_targets("all") if name not in text]

    def begin(self, ctx: RunContext, concept: Concept) -> Hunted:
        """A concept with its own words and images of it."""
        sentences, neutral = (list(side) for side in zip(*concept_pairs(concept, ctx.prompts("erase")), strict=True))
        generator = ctx.generator(f"stereo/images/{concept.name}")
        x0, _ = images_of(ctx, sentences, self.config.images if self.config.loops else 1, generator)
        encode, phrase = ctx.backbone.encode, concept.phrases[0]
        encoded, filled = encode(sentences), encode([concept.neutralise(t.format(phrase)) for t in concept.templates])
        return Hunted(concept, encoded, [encode([phrase])], [encoded], encode(neutral), filled, x0)

    def hunt(self, ctx: RunContext, own: Hunted, loop: int) -> None:
        """Learn a word under which the model as it stands draws the concept, and keep it."""
        config = self.config
        how: dict[str, Any] = {"steps": config.word_steps, "batch": config.batch, "lr": config.word_lr}
        word = learned(ctx, own.concept, own.examples, name=f"stereo/word/{own.concept.name}/{loop}", **how)
        own.words.append(read(ctx, word, ["{}"]))
        own.prompts.append(read(ctx, word, own.concept.templates))

    def _search_pool(self, ctx: RunContext, own: Hunted, loop: int) -> Pool:
        """Points of trajectories of the model as it stands under the last word; `predictions` holds the target."""
        pool = self._pool(ctx, own.prompts[-1], f"stereo/{own.concept.name}/{loop}", [self._anchor(ctx, own, own.prompts[-1])])
        none, full, anchor = pool.predictions.unbind(1)
        return replace(pool, predictions=negative_guidance(anchor, full, none, self.config.eta)[:, None])

    def last_pools(self, ctx: RunContext, own: Hunted) -> list[Pool]:
        """Of the base, for each word; `predictions` holds the composed target."""
        pools = []
        for k, prompts in enumerate(own.prompts):
            name = f"stereo/{own.concept.name}/last/{k}"
            generator, n = ctx.generator(f"{name}/sentences"), len(prompts)
            sentences = own.sentences[torch.randint(len(own.sentences), (n,), generator=generator)]
            others = [self._anchor(ctx, own, prompts), sentences, *(word.repeat(n) for word in own.words)]
            pool = self._pool(ctx, prompts, name, others)
            none, _, anchor, scene, *words = pool.predictions.unbind(1)
            goal = composed(anchor, none, scene, torch.stack(words), keep=self.config.keep, push=self.config.push)
            pools.append(replace(pool, predictions=goal[:, None]))
        return pools

    def _anchor(self, ctx: RunContext, own: Hunted, prompts: Conditioning) -> Conditioning:
        """What the targets for some prompts start from, a row for each of them."""
        if self.config.anchor == "empty":
            return ctx.backbone.encode([""]).repeat(len(prompts))
        return own.neutral if prompts is own.prompts[0] else own.filled

    def _pool(self, ctx: RunContext, prompts: Conditioning, name: str, others: Sequence[Conditioning] = ()) -> Pool:
        """Trajectories under prompts drawn at random; each of `others` has a row for each prompt."""
        n, generator = self.config.trajectories, ctx.generator(name)
        drawn = torch.randperm(len(prompts), generator=generator)[:n]
        seeds = torch.randint(2**31, (n,), generator=generator).tolist()
        protocol = with_guidance(ctx, self.config.guidance)
        return base_pool(ctx.backbone, protocol, prompts[drawn], seeds, [other[drawn] for other in others])

    def _trained(self, ctx: RunContext, pools: Sequence[Pool], name: str, lr: float) -> Deltas:
        """What training on pools, in turns, adds to the weights as they stand."""
        config = self.config.model_copy(update={"lr": lr})

        def losses(student: Student, batch: int, generator: torch.Generator) -> Losses:
            at = pools[batch // config.accumulate % len(pools)].sample(config.batch, generator)
            return {"erase": squared_error(student.predict(at.x, at.tau, at.cond), at.predictions[:, 0])}

        with self._student(ctx, name) as student:
            train(partial(losses, student), student.parameters, config, ctx=ctx, name=name)
            return student.deltas()

    def _student(self, ctx: RunContext, name: str) -> AbstractContextManager[Student]:
        config, layers = self.config, self.layers(ctx)
        if config.weights == "full":
            return nullcontext(whole(ctx, layers))
        return lora(ctx, name, layers, config.rank, ctx.generator(f"{name}/init"), init=config.init, alpha=config.alpha)


def composed(
    anchor: torch.Tensor, none: torch.Tensor, scene: torch.Tensor, words: torch.Tensor, *, keep: float, push: float
) -> torch.Tensor:
    """What the last erasing aims at: f(anchor) + keep (f(a) - f(0)) - push mean_w (f(w) - f(0)).

    Args:
        anchor: predictions (b, ...) to start from; the paper's are f(0).
        none: f(0), for the empty prompt.
        scene: f(a), for a sentence that holds the concept.
        words: f(w), (words, b, ...), for the concept's own words and those that were learned.
        keep: how much of the sentence.
        push: how far away from the words.
    """
    return anchor + keep * (scene - none) - push * (words - none).mean(0)
