"""MACE: refine what stands beside a concept, suppress the attention to it with a LoRA each, fuse all into one edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field

from erasekit.attention import attention_maps, token_positions
from erasekit.backbone import Conditioning
from erasekit.closedform import TextEdit, uce
from erasekit.concepts import Concept
from erasekit.config import Plan
from erasekit.deltas import Deltas, LowRank, concatenate, merged
from erasekit.erasure import Erasure
from erasekit.fusion import fusion, share
from erasekit.memory import LORA_GB, Footprint
from erasekit.method import Method, RunContext
from erasekit.pictures import kept_pictures, noised, pictures_of
from erasekit.sites import kept_rows, phrased_prompts, preserve_prompts, rows, site_deltas, site_weights
from erasekit.training import Losses, TrainingConfig, train_lora
from erasekit_mace.inputs import beside, hidden_moments
from erasekit_mace.losses import sample_tau, suppression


class MaceConfig(TrainingConfig):
    """Settings of MACE; steps, rate and so on are those of one concept's LoRA."""

    ridge: float = Field(1e-2, ge=0, description="ridge of both closed forms, relative to the size of their systems")
    refine_preserve: float = Field(1.0, ge=0, description="weight of a preserved embedding in the refinement")
    fuse_preserve: float = Field(1.0, ge=0, description="weight of a preserved embedding in the fusion")
    scope: str = Field("kv", description="linear layers that carry the LoRAs, a scope of the backbone")
    masks: str = Field("attention", description="where the concept is: attention, whole, grounded-sam or a registered one")
    detector: str = Field("IDEA-Research/grounding-dino-base", description="grounded-sam: hub id or folder of Grounding DINO")
    segmenter: str = Field("facebook/sam-vit-huge", description="grounded-sam: hub id or folder of SAM")
    window: tuple[float, float] = Field((0.0, 1.0), description="the part of the way on which attention is suppressed")
    pictures: int = Field(16, ge=1, description="pictures of each concept that the base draws to train on")
    kept_pictures: int = Field(32, ge=1, description="pictures of kept prompts, drawn where layers read more than raw text")
    batch: int = Field(8, ge=1, description="pictures in a step")
    steps: int = Field(100, ge=0, description="training steps per concept; 0 skips the LoRAs")
    lr: float = Field(1e-2, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")


class Pictures(NamedTuple):
    """A concept's pictures: finished latents, prompts, tokens whose attention is suppressed, and where in the picture."""

    x0: torch.Tensor
    cond: Conditioning
    tokens: torch.Tensor
    masks: torch.Tensor


class Read(NamedTuple):
    """Layers that read the same, and the moments of what they read: for each concept, and for what is kept."""

    layers: list[str]
    own: list[torch.Tensor]
    kept: torch.Tensor


class Mace(Method):
    """MACE (arXiv:2403.06135), written from the paper's equations.

    On FLUX.1 this is erasekit's adaptation: the refinement edits the two text sites, the pooled embedding counting as a
    word beside the concept; the LoRAs sit on `add_k_proj` and `add_v_proj` of the double blocks and suppress the image
    tokens' attention to the concept's T5 tokens; their fusion is fitted to what those layers read on the way to
    pictures, since that is no raw text.
    """

    name = "mace"
    Config = MaceConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dit": {"scope": "add_kv"}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {"steps": 50, "lr": 1e-4, "batch": 1, "pictures": 8, "warmup": 0, "window": (0.6, 0.8)},
        "official-object": {"steps": 50, "lr": 1e-5, "batch": 1, "pictures": 8, "warmup": 0, "window": (0.6, 0.8)},
        "official-explicit": {"steps": 120, "lr": 1e-5, "batch": 1, "pictures": 8, "warmup": 0},
    }
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "without LoRAs": {"steps": 0},
        "without masks": {"masks": "whole"},
    }
    slots = ("masks",)
    config: MaceConfig

    def footprint(self, plan: Plan) -> Footprint:
        """Pictures with their attention maps."""
        config = self.config
        return Footprint(rows=config.batch if config.steps else 0, maps=True, trained_gb=LORA_GB * len(plan.concepts))

    def erase(self, ctx: RunContext) -> Erasure:
        """The three stages; what the fusion leaves of the refinement is a part of its own."""
        refined = self.refine(ctx)
        whole = concatenate(list(refined.values()))
        pictures = [self.pictures(ctx, concept) for concept in ctx.concepts] if self.config.steps else []
        kept = None
        if pictures and not self._raw(ctx):  # the LoRAs' layers read more than raw text
            kept = kept_pictures(ctx, self.config.kept_pictures, "mace/kept")
        with merged(ctx.backbone.denoiser, whole):
            loras = [self.suppress(ctx, concept, drawn) for concept, drawn in zip(ctx.concepts, pictures, strict=False)]
            fused = self.fuse(ctx, whole, loras, self.moments(ctx, pictures, kept))
        deltas = {}
        for concept, own in zip(ctx.concepts, fused, strict=True):
            refinement = {module: delta for module, delta in refined[concept.name].items() if module not in own}
            parts = {"refine": refinement, "fusion": own}
            deltas[concept.name] = {part: layers for part, layers in parts.items() if layers}
        return Erasure.of(ctx, method=self.name, config=self.config.model_dump(), deltas=deltas)

    # Stage 1

    def refine(self, ctx: RunContext) -> dict[str, Deltas]:
        """Closed-form refinement of the text sites, one solve for all concepts, each concept's share apart."""
        config = self.config
        shares: dict[str, list[TextEdit]] = {}
        for reads in sorted({site.reads for site in ctx.backbone.text_sites()}):
            pairs = [beside(ctx, concept, phrased_prompts(ctx, concept), reads) for concept in ctx.concepts]
            mine, goal = (torch.cat(column) for column in zip(*pairs, strict=True))
            kept = kept_rows(ctx.backbone, _kept(ctx), reads)
            edit = uce(mine, goal, kept, lamb=config.ridge, erase_scale=1.0, preserve_scale=config.refine_preserve)
            shares[reads] = [part.compressed() for part in edit.split([len(own) for own, _ in pairs])]
        return site_deltas(ctx, shares, site_weights(ctx.backbone))

    # Stage 2

    def pictures(self, ctx: RunContext, concept: Concept) -> Pictures:
        """Pictures of a concept by the base, with the tokens to suppress: its phrase, and in CLIP the prompt's end and pads."""
        prompts, generator = phrased_prompts(ctx, concept), ctx.generator(f"mace/pictures/{concept.name}")
        x0, chosen = pictures_of(ctx, prompts, self.config.pictures, generator)
        cond, tokens = ctx.backbone.encode(chosen), token_positions(ctx.backbone, chosen, concept.phrases)
        masks = ctx.component("masks", self.config.masks)(ctx, concept, x0, cond, tokens, self.config)
        if ctx.backbone.capabilities.family == "unet":
            tokens = tokens | (torch.arange(tokens.shape[1]) >= cond.lengths[:, None] - 1).to(tokens.device)
        return Pictures(x0, cond, tokens, masks)

    def suppress(self, ctx: RunContext, concept: Concept, pictures: Pictures) -> dict[str, LowRank]:
        """Train a concept's rank-1 LoRA on top of the refined weights, the other concepts' left out."""
        layers, init = ctx.backbone.lora_targets(self.config.scope), ctx.generator(f"mace/init/{concept.name}")
        name = f"mace-{ctx.concepts.index(concept)}"
        return train_lora(self.losses(ctx, pictures), layers, 1, self.config, ctx=ctx, name=name, init=init)

    def losses(self, ctx: RunContext, pictures: Pictures) -> Any:
        """The loss of a step as `train` asks for it: attention to the concept where it is, on the way to its pictures."""

        def losses(batch: int, generator: torch.Generator) -> Losses:
            index = torch.randint(len(pictures.x0), (self.config.batch,), generator=generator)
            tau = sample_tau(self.config.window, len(index), generator)
            with attention_maps(ctx.backbone.denoiser) as maps:
                ctx.predict(noised(ctx, pictures.x0[index], tau, generator), tau, pictures.cond[index])
            return {"attention": suppression(maps.values(), pictures.tokens[index], pictures.masks[index])}

        return losses

    # Stage 3

    def moments(
        self, ctx: RunContext, pictures: Sequence[Pictures], kept: tuple[torch.Tensor, Conditioning] | None
    ) -> list[Read]:
        """Groups of layers that read the same, and what they read for each concept and for kept prompts."""
        targets = ctx.backbone.lora_targets(self.config.scope)
        if self._raw(ctx):
            own = [rows(ctx.backbone.encode(phrased_prompts(ctx, concept)), "tokens") for concept in ctx.concepts]
            own_DD = [tokens_ND.T @ tokens_ND for tokens_ND in own]
            kept_MD = kept_rows(ctx.backbone, _kept(ctx), "tokens")
            return [Read(targets, own_DD, kept_MD.T @ kept_MD)]
        if kept is None:
            return []
        blocks: dict[str, list[str]] = {}
        for target in targets:
            blocks.setdefault(target.rpartition(".")[0], []).append(target)
        sets = [*((drawn.x0, drawn.cond) for drawn in pictures), kept]
        first = [block[0] for block in blocks.values()]
        read = [hidden_moments(ctx, first, x0, cond, f"mace/rows/{i}") for i, (x0, cond) in enumerate(sets)]
        return [Read(block, [one[block[0]] for one in read[:-1]], read[-1][block[0]]) for block in blocks.values()]

    def fuse(
        self, ctx: RunContext, refined: Deltas, loras: Sequence[Mapping[str, LowRank]], reads: Sequence[Read]
    ) -> list[Deltas]:
        """Fuse the refinement and every concept's LoRA into one edit; each concept's share of it."""
        config = self.config
        fused: list[Deltas] = [{} for _ in ctx.concepts]
        for layers, own, kept in reads:
            maps = fusion(own, kept, ridge=config.ridge, preserve_scale=config.fuse_preserve)
            for i, k_DD in enumerate(maps):
                for layer in layers:
                    changes = [low for d in (refined, *loras[i : i + 1]) if isinstance(low := d.get(layer), LowRank)]
                    fused[i][layer] = share(changes, k_DD)
        return fused

    def _raw(self, ctx: RunContext) -> bool:
        """Whether the layers that carry the LoRAs read raw token embeddings."""
        sites = {site.name for site in ctx.backbone.text_sites() if site.reads == "tokens"}
        return sites.issuperset(ctx.backbone.lora_targets(self.config.scope))


def _kept(ctx: RunContext) -> list[str]:
    """What may not change: the empty prompt, what the concepts ask to keep, the task's preserved prompts and captions."""
    return list(dict.fromkeys([*preserve_prompts(ctx), *(p.text for p in ctx.prompts("captions"))]))
