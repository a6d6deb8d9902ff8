"""SPEED (ICLR 2026): a closed-form edit that leaves what must stay exactly where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.backbones.protocol import Backbone
from erasekit.erasures.deltas import Deltas, LowRank
from erasekit.erasures.erasure import Erasure
from erasekit.methods.closedform import Pairs, RidgeUnit, TextEdit, layer_deltas
from erasekit.methods.context import RunContext
from erasekit.methods.method import Method, MethodConfig, OneOrSeveral
from erasekit.methods.prompts import guided_texts, preserve_prompts
from erasekit.methods.sites import Tokens, last_words, site_embeddings, site_weights
from erasekit_speed.solve import affected, augmented, invariants, null_projector, speed, unconstrained

VALUES = {"v": "to_v", "k": "to_k", "kv": ""}  # what the name of an edited layer holds

# Chosen on validation prompts. A concept's end token and pads carry it too. Without the filter, as published for many
# concepts: what it leaves out lies partly in the null space of the rest, and moves.
MINI: dict[str, Any] = {"layers": "kv", "tokens": "all", "bare": False, "filter": False, "threshold_unit": "relative"}


class SpeedConfig(MethodConfig):
    """Settings of SPEED.

    The defaults are those of the published code (Ouxiang-Li/SPEED) for one concept.
    """

    layers: Literal["v", "k", "kv"] = Field(
        "v", description="of cross-attention: values (published), keys, or both; FLUX.1's two text layers are always edited"
    )
    tokens: Tokens = Field(
        "last", description="edited positions: the concept's last token (published; nudity all), the suffix from there, or all"
    )
    bare: bool = Field(True, description="the concept's phrases by themselves are its prompts (published), no templates")
    guides: OneOrSeveral = Field((), description="what the concept becomes instead of its neutral words ('' as published)")
    threshold: float = Field(
        0.1, gt=0, description="eigenvalues of what must stay below it are its null space (published: 0.1, many concepts 1e-4)"
    )
    threshold_unit: RidgeUnit = Field(
        "absolute", description="of the threshold: as published, or relative to the mean of the moment's diagonal"
    )
    scale: float = Field(1.0, gt=0, description="how strongly weights are held (published: 1, nudity 0.7, many concepts 0.05)")
    lamb: float = Field(0.0, ge=0, description="how far the empty prompt may move (published: 0, nudity 0.5)")
    centres: int = Field(3, ge=1, description="k-means centres of the empty prompt that are held (published: 3)")
    augment: int = Field(10, ge=0, description="noisy copies of each preserved embedding (published: 10)")
    filter: bool = Field(True, description="preserve only what an edit without constraints would move (published: yes)")


class Speed(Method):
    """SPEED (arXiv:2503.07392), all concepts in one solve for each layer.

    What must stay is filtered (those that an edit without constraints moves), augmented (with noise that a layer hardly
    reads) and then held exactly: the edit lives in the null space of their second moment. The first token and the pads of the
    empty prompt are held as equality constraints.
    """

    name = "speed"
    Config = SpeedConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd15-mini": MINI | {"threshold": 1e-4},
        "flux-mini": MINI | {"threshold": 3e-2},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": SpeedConfig(guides=("",)).model_dump()}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "without filtering": {"filter": False},
        "without augmentation": {"augment": 0},
    }
    config: SpeedConfig

    @property
    def seeded(self) -> bool:
        """Only the copies of preserved embeddings are random."""
        return bool(self.config.augment)

    def texts(self, ctx: RunContext) -> list[str]:
        """Also what the guides make of the concepts' prompts."""
        return [*super().texts(ctx), *guided_texts(ctx, self.config.guides)]

    def erase(self, ctx: RunContext) -> Erasure:
        """Solve for every edited layer by itself: what is filtered and how it is augmented depend on its weight."""
        config, backbone, weights = self.config, ctx.backbone, site_weights(ctx.backbone)
        embeddings = site_embeddings(ctx, tokens=config.tokens, guides=config.guides, bare=config.bare)
        empty = {reads: embedded(backbone, [""], reads) for reads in embeddings}
        kept = {reads: self.kept(ctx, reads, rows_MD) for reads, rows_MD in empty.items()}
        deltas: dict[str, Deltas] = {concept.name: {} for concept in ctx.concepts}
        sites = [site for site in backbone.text_sites() if VALUES[config.layers] in site.name] or backbone.text_sites()
        for site in sites:
            reads, weight, generator = site.reads, weights[site.name], ctx.generator(f"speed/{site.name}")
            edits = self.solve(embeddings[reads].pairs, kept[reads], empty[reads], weight, generator)
            for own, delta in zip(deltas.values(), layer_deltas(edits, weight), strict=True):
                own[site.name] = LowRank(delta.up.cpu(), delta.down.cpu())
        return self.erasure(ctx, deltas={name: {"edit": own} for name, own in deltas.items()})

    def kept(self, ctx: RunContext, reads: str, empty_MD: torch.Tensor) -> torch.Tensor:
        """What must stay (n, width); where nothing is named, the empty prompt but for its first token, as in published code."""
        prompts = [prompt for prompt in preserve_prompts(ctx) if prompt]
        if prompts:
            return embedded(ctx.backbone, prompts, reads, last=self.config.tokens == "last")
        return empty_MD[1:] if len(empty_MD) > 1 else empty_MD

    def solve(
        self,
        pairs: tuple[Pairs, ...],
        kept_ND: torch.Tensor,
        empty_MD: torch.Tensor,
        weight_OD: torch.Tensor,
        generator: torch.Generator,
    ) -> list[TextEdit]:
        """Each concept's share of the edit of one layer."""
        config, n = self.config, len(pairs)
        change_DD = torch.stack([p.change_DD for p in pairs]).sum(0) / n
        target_DD = torch.stack([p.ww_DD for p in pairs]).sum(0) / n
        edit_OD = weight_OD @ unconstrained(change_DD, target_DD)
        kept_ND = affected(kept_ND, edit_OD) if config.filter else kept_ND
        kept_ND = augmented(kept_ND, weight_OD, edit_OD, config.augment, generator)
        moment_DD = kept_ND.T @ kept_ND / len(kept_ND)
        unit = float(moment_DD.diagonal().mean()) if config.threshold_unit == "relative" else 1.0
        null_DD = null_projector(moment_DD, config.threshold * unit)
        return speed(pairs, null_DD, invariants(empty_MD, config.centres), scale=config.scale, lamb=config.lamb)


def embedded(backbone: Backbone, prompts: Sequence[str], reads: str, *, last: bool = False) -> torch.Tensor:
    """What the sites that read one kind of text are given for prompts (n, width), float64: all positions, or the last token."""
    cond = backbone.encode(prompts)
    if reads == "pooled":
        rows = cond.pooled
    elif last:
        rows = last_words(cond)
    else:
        rows = cond.tokens.flatten(0, 1)
    assert rows is not None
    return rows.to(backbone.device, torch.float64)
