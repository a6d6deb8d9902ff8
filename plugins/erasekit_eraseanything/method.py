"""EraseAnything: a LoRA on attention to text, trained on two levels in turns: one erases, the other preserves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.backbones.attention import attention_maps
from erasekit.backbones.memory import LORA_GB, Footprint
from erasekit.backbones.protocol import Conditioning, concatenate
from erasekit.erasures.erasure import Erasure
from erasekit.methods.adapters import AdapterBank, Init
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.images import kept_images, noised
from erasekit.methods.method import Method, OrNone
from erasekit.methods.training import LoraTrainingConfig, Losses, squared_error, train
from erasekit.methods.trajectories import at_scale, negative_guidance
from erasekit_eraseanything import losses
from erasekit_eraseanything.material import Material, Prompts, material, material_texts

# What erased on validation prompts of the mini world. On flux-mini a style reaches the image by CLIP's pooled prompt as well,
# past the text's queries and keys: with LoRAs on these alone .96 of a style was left.
MINI = {
    "attention": 0.1,
    "image_tokens": "mean",
    "preserve": 1.0,
    "contrast": 0.01,
    "layers": "all",
    "told": None,
    "images": 16,
    "batch": 8,
    "lr": 2e-3,
    "init": "uniform",
    "schedule": "cosine",
    "warmup": 10,
    "clip": 1.0,
}


class EraseAnythingConfig(LoraTrainingConfig):
    """Settings of EraseAnything. Steps of the two levels take turns; both count.

    The defaults are those of the published configuration (tomguluson92/EraseAnything, September 2025), for FLUX.1-dev.
    """

    rank: int = Field(8, ge=1, description="rank of each concept's LoRA (published: 8)")
    scope: str = Field("add_qk", description="linear layers that carry the LoRAs, a scope of the backbone (published: add_qk)")
    eta: float = Field(1.0, ge=0, description="how far the target is pushed away from the concept (published: 1)")
    erase: float = Field(1.0, ge=0, description="lower level: weight of the erasing loss (published: 1)")
    attention: float = Field(0.001, ge=0, description="lower level: weight of the attention to the concept (published: 0.001)")
    image_tokens: Literal["mean", "sum"] = Field(
        "sum", description="attention to the concept as a sum over image tokens (the paper's), or as a mean"
    )
    preserve: float = Field(0.1, ge=0, description="upper level: weight of what is kept (published: 0.1)")
    contrast: float = Field(0.1, ge=0, description="upper level: weight of the contrastive term (published: 0.1)")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive term (published: 0.07)")
    negatives: int = Field(3, ge=1, description="unrelated words in a contrastive step (published: 3)")
    layers: Literal["all", "last"] = Field("last", description="layers whose attention is looked at (published: last)")
    told: Annotated[float | None, OrNone] = Field(
        3.0,
        ge=0,
        description="guidance scale that a model is told in training, if it is told one (published: 3); none, the protocol's",
    )
    synonyms: dict[str, tuple[str, ...]] = Field({}, description="other words per concept; left out, those of our list")
    unrelated: tuple[str, ...] = Field((), description="unrelated words; left out, what a concept preserves, or our list")
    shuffle: float = Field(0.9, ge=0, le=1, description="how often the words of a prompt are shuffled (published: 0.9)")
    swap: float = Field(0.5, ge=0, le=1, description="how often a synonym takes the concept's place (published: 0.5)")
    versions: int = Field(4, ge=1, description="wordings of each image's prompt: itself and rewordings")
    images: int = Field(5, ge=1, description="images of each concept that the base draws (published: 3 to 5, the user's)")
    kept_images: int = Field(40, ge=1, description="images of kept prompts that the base draws")
    batch: int = Field(1, ge=1, description="images in a step; half as many in a contrastive one (published: 1)")
    steps: int = Field(200, ge=0, description="training steps per concept, those of both levels (published: 200)")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW (published: 1e-3)")
    init: Init = Field("gaussian", description="what A begins with: uniform in +-1/sqrt(in), or gaussian of deviation 1/rank")
    weight_decay: float = Field(1e-5, ge=0, description="weight decay of AdamW (published: 1e-5)")


class EraseAnything(Method):
    """EraseAnything (arXiv:2412.20413), a method for FLUX.1.

    Unlike the published code, the teacher is the base without LoRAs, latents are as noisy as the denoiser is told, word
    positions are each prompt's own, images come from the base, and what is kept is held to the base's prediction.

    The form for Stable Diffusion is erasekit's adaptation, and nobody has published settings for it: those of FLUX.1 are taken
    over, with `to_k` and `to_v` of the cross-attentions in the place of `add_k_proj` and `add_q_proj`. Keys and queries (scope
    `qk`) only move attention, and it has nowhere to go: in CLIP the end of a prompt and every pad carry the concept as well. In
    FLUX.1 they change the text stream itself.
    """

    name = "eraseanything"
    Config = EraseAnythingConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {"scope": "kv"},
        "sd15-mini": MINI | {"lr": 5e-3},
        "flux-mini": MINI | {"scope": "all_attn", "steps": 100, "lr": 4e-3},
    }
    # Each family has layers of its own.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": EraseAnythingConfig().model_dump(exclude={"scope"})}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "without attention regulariser": {"attention": 0.0},
        "without contrastive term": {"contrast": 0.0},
        "without upper level": {"preserve": 0.0, "contrast": 0.0},
    }
    curves: ClassVar[Mapping[str, str]] = {
        "erase": "lower level: how far the prediction for the concept is from the base's, guided away from it",
        "attention": "lower level: how much the image attends to the concept's words",
        "preserve": "upper level: how far predictions for everything else have moved from the base's",
        "contrast": "upper level: how much nearer the concept is to its own words than to unrelated ones",
    }
    config: EraseAnythingConfig

    def footprint(self, plan: Planned) -> Footprint:
        """The upper level's two passes, attention maps with them."""
        config = self.config
        rows = config.batch + max(1, config.batch // 2) if config.steps else 0
        return Footprint(rows=rows, maps=True, trained_gb=LORA_GB * len(plan.concepts))

    def texts(self, ctx: RunContext) -> list[str]:
        """Also the wordings of the images' prompts, and the words that are compared."""
        return [*super().texts(ctx), *(text for concept in ctx.concepts for text in material_texts(ctx, concept, self.config))]

    def erase(self, ctx: RunContext) -> Erasure:
        """Train a LoRA for each concept, all of them active, one in turn."""
        config = self.config.model_copy(update={"steps": self.config.steps * len(ctx.concepts)})
        with self.student(ctx) as (bank, step, parameters):
            train(step, parameters, config, ctx=ctx, name="eraseanything")
            deltas = {name: {"adapter": bank.deltas(name)} for name in bank.names}
        return self.erasure(ctx, deltas=deltas)

    @contextmanager
    def student(self, ctx: RunContext) -> Iterator[tuple[AdapterBank, EraseAnythingStep, list[torch.nn.Parameter]]]:
        """The denoiser with a LoRA for each concept, the losses of a step, and what they train; no LoRA is left at the end."""
        config = self.config
        materials = [material(ctx, concept, config) for concept in ctx.concepts]
        kept = kept_images(ctx, config.kept_images, "eraseanything/kept")
        with AdapterBank(ctx.backbone) as bank:
            for concept in ctx.concepts:
                generator = ctx.generator(f"eraseanything/init/{concept.name}")
                layers = ctx.backbone.lora_targets(config.scope)
                bank.add(concept.name, layers, config.rank, generator, init=config.init, alpha=config.alpha)
            parameters = [p for name in bank.names for p in bank.train_only(name)]
            told = replace(ctx, protocol=at_scale(ctx.protocol, config.told))
            yield bank, EraseAnythingStep(config, told, bank, materials, kept), parameters


class EraseAnythingStep:
    """The losses of one step: even ones are the lower level's, odd ones the upper level's; concepts take turns."""

    def __init__(
        self,
        config: EraseAnythingConfig,
        ctx: RunContext,
        bank: AdapterBank,
        materials: Sequence[Material],
        kept: tuple[torch.Tensor, Conditioning],
    ) -> None:
        """Keep what a step draws from, one material for each adapter of the bank."""
        self.config, self.ctx, self.bank, self.materials = config, ctx, bank, materials
        self.kept_x0, self.kept_cond = kept

    def __call__(self, batch: int, generator: torch.Generator) -> Losses:
        """The named losses of batch number `batch`."""
        step = batch // self.config.accumulate  # the parts of a step's batch belong to one level of one concept
        turn, level = step // 2 % len(self.materials), step % 2
        self.bank.train_only(self.bank.names[turn])
        if level == 0:
            return self.lower(self.materials[turn], generator)
        return self.upper(self.materials[turn], generator)

    def lower(self, own: Material, generator: torch.Generator) -> Losses:
        """Erase: predict away from the concept, and attend to it less."""
        image = torch.randint(len(own.x0), (self.config.batch,), generator=generator)
        row = image * own.versions + torch.randint(own.versions, image.shape, generator=generator)
        x, tau = self._noised(own.x0[image], generator)
        said = own.wordings[row]
        with torch.no_grad(), self.bank.teacher():
            both = concatenate([said.cond, own.neutral[row]])
            concept, neutral = self.ctx.predict(torch.cat([x, x]), torch.cat([tau, tau]), both).chunk(2)
        prediction, maps = self._attend(x, tau, said.cond)
        target = negative_guidance(neutral, concept, neutral, self.config.eta)
        return {
            "erase": self.config.erase * squared_error(prediction, target),
            "attention": self.config.attention * losses.columns(maps, said.tokens, total=self.config.image_tokens == "sum"),
        }

    def upper(self, own: Material, generator: torch.Generator) -> Losses:
        """Preserve: predict for what is kept as the base does, and attend to the concept as to other words."""
        image = torch.randint(len(self.kept_x0), (self.config.batch,), generator=generator)
        x, tau = self._noised(self.kept_x0[image], generator)
        with torch.no_grad(), self.bank.teacher():
            target = self.ctx.predict(x, tau, self.kept_cond[image])
        return {
            "preserve": self.config.preserve * squared_error(self.ctx.predict(x, tau, self.kept_cond[image]), target),
            "contrast": self.config.contrast * self.contrast(own, generator),
        }

    def contrast(self, own: Material, generator: torch.Generator) -> torch.Tensor:
        """The contrastive term on images of the concept, all words in the same templates."""
        image = torch.randint(len(own.x0), (max(1, self.config.batch // 2),), generator=generator)
        template = torch.randint(len(own.itself.cond), image.shape, generator=generator)
        x, tau = self._noised(own.x0[image], generator)
        pick = torch.randperm(len(own.others), generator=generator)[: self.config.negatives].tolist()
        away = [own.itself]
        if own.synonyms:
            away.append(own.synonyms[int(torch.randint(len(own.synonyms), (1,), generator=generator))])
        words = [prompts[template] for prompts in [*(own.others[i] for i in pick), *away]]
        with torch.no_grad(), self.bank.teacher():
            former = torch.stack([self._feature(x, tau, word) for word in words])
        anchor = self._feature(x, tau, own.itself[template])
        return losses.contrast(anchor, former[: len(pick)], former[len(pick) :], self.config.temperature)

    def _feature(self, x: torch.Tensor, tau: torch.Tensor, word: Prompts) -> torch.Tensor:
        return losses.feature(self._attend(x, tau, word.cond)[1], word.tokens)

    def _attend(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The prediction, and the attention maps of the layers that are looked at."""
        with attention_maps(self.ctx.backbone.denoiser) as maps:
            prediction = self.ctx.predict(x, tau, cond)
        layers = list(maps.values())
        return prediction, layers[-1:] if self.config.layers == "last" else layers

    def _noised(self, x0: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        tau = torch.rand(len(x0), generator=generator)
        return noised(self.ctx, x0, tau, generator), tau
