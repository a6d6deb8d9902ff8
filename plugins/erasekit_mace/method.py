"""MACE: refine what stands beside a concept, suppress the attention to it with a LoRA each, fuse all into one edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from erasekit.backbones.attention import attention_maps, token_positions
from erasekit.backbones.memory import LORA_GB, Footprint
from erasekit.backbones.protocol import Conditioning
from erasekit.concepts import Concept
from erasekit.erasures.deltas import Deltas, LowRank, merged, summed
from erasekit.erasures.erasure import Erasure
from erasekit.methods.adapters import Init
from erasekit.methods.closedform import RANK_ERROR, Pairs, RidgeUnit, TextEdit, uce
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.fusion import Read, fuse
from erasekit.methods.images import images_of, kept_images, noised
from erasekit.methods.method import Method, OrNone
from erasekit.methods.prompts import phrased_prompts, preserve_prompts
from erasekit.methods.sites import held, kept_moment, site_deltas, site_weights
from erasekit.methods.training import LoraTrainingConfig, Losses, train_lora
from erasekit_mace.inputs import beside, hidden_moments
from erasekit_mace.losses import sample_tau, suppression
from erasekit_mace.templates import wordings

COCO = 616_767  # captions of COCO 2014, which the published caches of kept embeddings are made of
# What erased the objects of the mini world on validation prompts.
CLOSED_FORMS = {
    "ridge": 1e-2,
    "ridge_unit": "relative",
    "refine_preserve": 1.0,
    "fuse_preserve": 1.0,
    "captions": None,
    "domain": 1.0,
    "templates": "own",
}
MINI = CLOSED_FORMS | {
    "attention": "mean",
    "window": (0.0, 1.0),
    "images": 16,
    "batch": 8,
    "steps": 100,
    "lr": 1e-2,
    "init": "uniform",
    "schedule": "cosine",
    "warmup": 10,
}
# Nobody has published MACE for FLUX.1. Its LoRAs are trained as published for Stable Diffusion. The published weights of the
# closed forms are made for CLIP's embeddings, and for caches of them: T5's have other lengths, and what the double blocks read
# has others again, so that ridges are relative and every kept embedding counts as one of the concept's.
FLUX = CLOSED_FORMS | {"scope": "add_kv"}


class MaceConfig(LoraTrainingConfig):
    """Settings of MACE; steps, rate and so on are those of one concept's LoRA.

    The defaults are those of the published configurations (Shilin-LU/MACE) for one person; a hundred artists differ in
    `domain`. Presets have those for objects and for explicit content.
    """

    ridge: float = Field(0.0, ge=0, description="ridge of both closed forms (published: 0; objects 10, 100 or 1000)")
    ridge_unit: RidgeUnit = Field(
        "absolute", description="of the ridge: relative to the mean of the system's diagonal, or absolute as published"
    )
    refine_preserve: float = Field(
        1e-8, ge=0, description="weight of a kept caption in the refinement (published: 1e-4, which its code multiplies twice)"
    )
    fuse_preserve: float = Field(1e-4, ge=0, description="weight of a kept caption in the fusion (published: 1e-4)")
    captions: Annotated[int | None, OrNone] = Field(
        COCO, ge=1, description="how many captions the task's stand for (published: COCO's 616767); none, for themselves"
    )
    domain: float = Field(
        8e3,
        ge=0,
        description="how much more than a caption a preserved prompt counts (published: 8e3, ten people or artists 8e4)",
    )
    templates: Literal["own", "thirty"] = Field(
        "thirty", description="prompts of a concept: its own and the task's, or thirty (the paper's number, our words)"
    )
    attention: Literal["mean", "sum"] = Field(
        "sum", description="attention to the concept as a sum over layers, heads, image and text tokens (the paper's) or a mean"
    )
    rank_error: float = Field(
        RANK_ERROR, ge=0, lt=1, description="what a lower rank of the refinement may cost, relative, root mean square"
    )
    scope: str = Field("kv", description="linear layers that carry the LoRAs, a scope of the backbone (published: kv)")
    masks: str = Field(
        "attention", description="where the concept is: attention, whole, grounded-sam (the published one) or a registered one"
    )
    detector: str = Field("IDEA-Research/grounding-dino-base", description="grounded-sam: hub id or folder of Grounding DINO")
    segmenter: str = Field("facebook/sam-vit-huge", description="grounded-sam: hub id or folder of SAM")
    window: tuple[float, float] = Field(
        (0.6, 0.8), description="the part of the way on which attention is suppressed (published: timesteps 400 to 200)"
    )
    images: int = Field(8, ge=1, description="images of each concept that the base draws to train on (published: 8)")
    kept_images: int = Field(32, ge=1, description="images of kept prompts, drawn where layers read more than raw text")
    batch: int = Field(1, ge=1, description="images in a step (published: 1)")
    steps: int = Field(
        50, ge=0, description="training steps per concept (published: 50; explicit content 120); 0 skips the LoRAs"
    )
    lr: float = Field(
        1e-4, gt=0, description="peak learning rate of AdamW (published: 1e-4; objects and explicit content 1e-5)"
    )
    init: Init = Field("gaussian", description="what A begins with: uniform in +-1/sqrt(in), or gaussian of deviation 1/rank")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient (published: 1); 0 does not clip")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW (published: 0.01)")


def _published(**others: Any) -> dict[str, Any]:
    """The published settings of Stable Diffusion, with others; each family has layers of its own."""
    return MaceConfig(**others).model_dump(exclude={"scope"})


class Images(NamedTuple):
    """A concept's images: finished latents, prompts, tokens whose attention is suppressed, and where in the image."""

    x0: torch.Tensor
    cond: Conditioning
    tokens: torch.Tensor
    masks: torch.Tensor


class Mace(Method):
    """MACE (arXiv:2403.06135), written from the paper's equations.

    On FLUX.1 this is erasekit's adaptation: the refinement edits the two text sites, the pooled embedding counting as a
    word beside the concept; the LoRAs sit on `add_k_proj` and `add_v_proj` of the double blocks and suppress the image
    tokens' attention to the concept's T5 tokens; their fusion is fitted to what those layers read on the way to
    images, since that is no raw text. On SD3.5, where CLIP's tokens stand before T5's, the phrase's tokens are those of both.

    The presets are the published runs but for three things: the masks (`masks=grounded-sam` draws them as published), the
    thirty templates, whose words are ours, and the loss, which is the paper's sum of squares where the code takes the root in
    each layer.
    """

    name = "mace"
    version = 2  # every pad counts in its closed forms
    Config = MaceConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dit": FLUX, "sd15-mini": MINI, "flux-mini": MINI}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": _published(),
        "official-object": _published(lr=1e-5, ridge=100.0, refine_preserve=0.0, fuse_preserve=0.0),
        # A window much wider than the way is uniform on it.
        "official-explicit": _published(
            lr=1e-5, steps=120, window=(-1.0, 2.0), refine_preserve=4.9e-13, fuse_preserve=7e-7, domain=0.0
        ),
    }
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "without LoRAs": {"steps": 0},
        "without masks": {"masks": "whole"},
    }
    slots = ("masks",)
    curves: ClassVar[Mapping[str, str]] = {"attention": "how much images attend to the concept's words where the concept is"}
    config: MaceConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Images with their attention maps."""
        config = self.config
        return Footprint(rows=config.batch if config.steps else 0, maps=True, trained_gb=LORA_GB * len(plan.concepts))

    def erase(self, ctx: RunContext) -> Erasure:
        """The three stages; what the fusion leaves of the refinement is a part of its own."""
        refined = self.refine(ctx)
        whole = summed(list(refined.values()))
        images = [self.images(ctx, concept) for concept in ctx.concepts] if self.config.steps else []
        kept = None
        if images and not self._raw(ctx):  # the LoRAs' layers read more than raw text
            kept = kept_images(ctx, self.config.kept_images, "mace/kept")
        with merged(ctx.backbone.denoiser, whole):
            loras = [self.suppress(ctx, concept, drawn) for concept, drawn in zip(ctx.concepts, images, strict=False)]
            fused = self.fuse(ctx, whole, loras, self.moments(ctx, images, kept))
        deltas = {}
        for concept, own in zip(ctx.concepts, fused, strict=True):
            refinement = {module: delta for module, delta in refined[concept.name].items() if module not in own}
            parts = {"refine": refinement, "fusion": own}
            deltas[concept.name] = {part: layers for part, layers in parts.items() if layers}
        return self.erasure(ctx, deltas=deltas)

    def texts(self, ctx: RunContext) -> list[str]:
        """Also the thirty templates, with the concept and with its neutral words."""
        own = [(concept, text) for concept in ctx.concepts for text in self.prompts(ctx, concept)]
        return [*super().texts(ctx), *(text for pair in own for text in (pair[1], pair[0].neutralise(pair[1])))]

    # Stage 1

    def refine(self, ctx: RunContext) -> dict[str, Deltas]:
        """Closed-form refinement of the text sites, one solve for all concepts, each concept's share apart."""
        config = self.config
        shares: dict[str, list[TextEdit]] = {}
        for reads in sorted({site.reads for site in ctx.backbone.text_sites()}):
            kept_DD = config.refine_preserve * self.kept(ctx, reads)
            pairs = [Pairs.empty(len(kept_DD), kept_DD.device) for _ in ctx.concepts]
            for concept, own in zip(ctx.concepts, pairs, strict=True):
                for mine, goal in beside(ctx, concept, self.prompts(ctx, concept), reads):
                    own.add(mine, goal)
            shares[reads] = uce(pairs, kept_DD, lamb=config.ridge, unit=config.ridge_unit, error=config.rank_error)
        return site_deltas(ctx, shares, site_weights(ctx.backbone))

    def prompts(self, ctx: RunContext, concept: Concept) -> list[str]:
        """Prompts that hold a phrase of the concept."""
        return wordings(concept) if self.config.templates == "thirty" else phrased_prompts(ctx, concept)

    def kept(self, ctx: RunContext, reads: str) -> torch.Tensor:
        """The moment of what may not change, (width, width): preserved prompts and captions, each counting beside a caption."""
        preserved, captions = _kept(ctx)
        kept_DD = self.config.domain * kept_moment(ctx.backbone, preserved, reads).total_DD
        if not captions:
            return kept_DD
        stands_for = (self.config.captions or len(captions)) / len(captions)
        return kept_DD + stands_for * held(ctx.backbone, captions, reads).total_DD

    # Stage 2

    def images(self, ctx: RunContext, concept: Concept) -> Images:
        """Images of a concept by the base, with the tokens to suppress: its phrase, of a causal encoder the end and pads."""
        prompts, generator = self.prompts(ctx, concept), ctx.generator(f"mace/pictures/{concept.name}")
        x0, chosen = images_of(ctx, prompts, self.config.images, generator)
        cond, tokens = ctx.backbone.encode(chosen), token_positions(ctx.backbone, chosen, concept.phrases)
        masks = ctx.component("masks", self.config.masks)(ctx, concept, x0, cond, tokens, self.config)
        if ctx.backbone.capabilities.text == "causal":
            tokens = tokens | (torch.arange(tokens.shape[1]) >= cond.lengths[:, None] - 1).to(tokens.device)
        return Images(x0, cond, tokens, masks)

    def suppress(self, ctx: RunContext, concept: Concept, images: Images) -> dict[str, LowRank]:
        """Train a concept's rank-1 LoRA on top of the refined weights, the other concepts' left out."""
        layers, generator = ctx.backbone.lora_targets(self.config.scope), ctx.generator(f"mace/init/{concept.name}")
        name = f"mace-{ctx.concepts.index(concept)}"
        return train_lora(self.losses(ctx, images), layers, 1, self.config, ctx=ctx, name=name, generator=generator)

    def losses(self, ctx: RunContext, images: Images) -> Any:
        """The loss of a step as `train` asks for it: attention to the concept where it is, on the way to its images."""

        def losses(batch: int, generator: torch.Generator) -> Losses:
            index = torch.randint(len(images.x0), (self.config.batch,), generator=generator)
            tau = sample_tau(self.config.window, len(index), generator)
            with attention_maps(ctx.backbone.denoiser) as maps:
                ctx.predict(noised(ctx, images.x0[index], tau, generator), tau, images.cond[index])
            where = images.tokens[index], images.masks[index]
            return {"attention": suppression(maps.values(), *where, total=self.config.attention == "sum")}

        return losses

    # Stage 3

    def moments(self, ctx: RunContext, images: Sequence[Images], kept: tuple[torch.Tensor, Conditioning] | None) -> list[Read]:
        """Groups of layers that read the same, and what they read for each concept and for kept prompts."""
        targets = ctx.backbone.lora_targets(self.config.scope)
        if self._raw(ctx):
            own = [held(ctx.backbone, self.prompts(ctx, concept), "tokens").total_DD for concept in ctx.concepts]
            return [Read(targets, own, self.kept(ctx, "tokens"))]
        if kept is None:
            return []
        blocks: dict[str, list[str]] = {}
        for target in targets:
            blocks.setdefault(target.rpartition(".")[0], []).append(target)
        sets = [*((drawn.x0, drawn.cond) for drawn in images), kept]
        first = [block[0] for block in blocks.values()]
        read = [hidden_moments(ctx, first, x0, cond, f"mace/rows/{i}") for i, (x0, cond) in enumerate(sets)]
        return [Read(block, [one[block[0]] for one in read[:-1]], read[-1][block[0]]) for block in blocks.values()]

    def fuse(
        self, ctx: RunContext, refined: Deltas, loras: Sequence[Mapping[str, LowRank]], reads: Sequence[Read]
    ) -> list[Deltas]:
        """Fuse the refinement and every concept's LoRA into one edit; each concept's share of it."""
        config = self.config
        changes = [summed([refined, dict(lora)]) for lora in loras] or [refined] * len(ctx.concepts)
        return fuse(changes, reads, ridge=config.ridge, unit=config.ridge_unit, preserve_scale=config.fuse_preserve)

    def _raw(self, ctx: RunContext) -> bool:
        """Whether the layers that carry the LoRAs read raw token embeddings."""
        sites = {site.name for site in ctx.backbone.text_sites() if site.reads == "tokens"}
        return sites.issuperset(ctx.backbone.lora_targets(self.config.scope))


def _kept(ctx: RunContext) -> tuple[list[str], list[str]]:
    """What may not change: the empty prompt, what the concepts ask to keep and the task's preserved prompts; captions."""
    preserved = preserve_prompts(ctx)
    return preserved, [text for text in dict.fromkeys(p.text for p in ctx.prompts("captions")) if text not in preserved]
