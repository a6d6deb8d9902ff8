"""TRACE: closed-form refinement, then LoRAs trained on the late part of the teacher's semi-target trajectories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from erasekit.adapters import AdapterBank
from erasekit.backbone import Conditioning, concatenate
from erasekit.closedform import TextEdit
from erasekit.concepts import Concept
from erasekit.config import Plan
from erasekit.deltas import Deltas, merged, scale
from erasekit.deltas import concatenate as concatenate_deltas
from erasekit.erasure import Erasure
from erasekit.memory import LORA_GB, Footprint
from erasekit.method import Method, OneOrSeveral, RunContext
from erasekit.near import near_words
from erasekit.sites import concept_prompts, paired, rows, site_deltas, site_weights
from erasekit.training import Losses, TrainingConfig, train
from erasekit.trajectories import Pool
from erasekit_trace import losses
from erasekit_trace.pool import clean_pool, pair_pool, target_pool
from erasekit_trace.slots import Adapter, Embeddings

ETAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.0)


class TraceConfig(TrainingConfig):
    """Settings of TRACE. Each slot names a registered component."""

    steps: int = Field(120, ge=0, description="training steps; 0 leaves stage 2 out")
    refine: str = Field("whitened", description="stage 1: eq1, delta, whitened, uce, none or a registered one")
    eta: float | None = Field(None, ge=0, le=1, description="damping of stage 1; left out, it is chosen on validation prompts")
    near_words: int = Field(
        0, ge=0, description="most other words for a concept, named by the model's own text encoder, that are erased with it"
    )
    ridge: float = Field(0.3, ge=0, description="ridge of the closed form, relative to the size of its system")
    preserve_scale: float = Field(
        10.0, ge=0, description="weight of the preserved prompts: against captions in whitened, against the concept's in uce"
    )
    caption_scale: float = Field(0.01, ge=0, description="uce: weight of captions of all kinds against the concept's prompts")
    fix_neutral: bool = Field(True, description="hold the neutral embeddings fixed as well")
    window: str = Field(
        "late", description="which part of the trajectory is trained: late, full, early, soft or a registered one"
    )
    tau0: float = Field(0.15, ge=0, le=1, description="where the window begins, 0 is noise and 1 the picture")
    early_anchor: bool = Field(False, description="before tau0, hold the concept prompts at the teacher (ANT); undoes stage 1")
    bank: str = Field("per-concept", description="LoRAs: per-concept, shared or a registered one")
    rank: int = Field(4, ge=1, description="rank of each LoRA")
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
    batch: int = Field(16, ge=1, description="concept points and clean points in a step, each")
    trajectories: int = Field(32, ge=1, description="teacher trajectories per concept")
    clean_trajectories: int = Field(96, ge=1, description="teacher trajectories of clean prompts")
    robustify: OneOrSeveral = Field((), description="registered stages that harden the text sites at the end, e.g. rece")


class Trace(Method):
    """TRACE (arXiv:2505.23312), as DESIGN.md section 8 defines it."""

    name = "trace"
    Config = TraceConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dit": {"scope": "qk_dual", "refine": "uce", "preserve_scale": 0.3, "ridge": 1e-3, "near_words": 16},
        # Estimates of what a GPU of 24 GB holds, not measured yet.
        **{name: {"batch": 4} for name in ("sd15", "sd14")},
        **{name: {"batch": 1, "trajectories": 8, "clean_trajectories": 24} for name in ("flux", "flux-schnell")},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "refine": "eq1",
            "near_words": 0,
            "window": "late",
            "bank": "per-concept",
            "integration": "pairs",
            "steps": 1000,
            "batch": 4,
        },
    }
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "without refinement": {"refine": "none"},
        "without trajectory constraint": {"window": "full"},
        "without separate LoRAs": {"bank": "shared"},
        "without integration loss": {"integration": "none"},
    }
    slots = ("refine", "window", "bank", "divergence", "robustify")
    config: TraceConfig

    def footprint(self, plan: Plan) -> Footprint:
        """Concept and clean points in one pass, and a pass for two concepts beside it."""
        config = self.config
        joint = max(2, config.batch // 2) if config.integration == "pairs" and len(plan.concepts) > 1 else 0
        rows = 2 * config.batch + joint if config.steps else 0
        return Footprint(rows=rows, trained_gb=LORA_GB * len(plan.concepts))

    def texts(self, ctx: RunContext) -> list[str]:
        """Also the words that the text encoder names, and prompts with two concepts."""
        ctx = replace(ctx, concepts=tuple(self._widened(ctx, concept) for concept in ctx.concepts))
        pairs = [texts for i, j in itertools.combinations(range(len(ctx.concepts)), 2) for texts in _pair_texts(ctx, i, j)]
        return [*super().texts(ctx), *(text for texts in pairs for text in texts)]

    def erase(self, ctx: RunContext) -> Erasure:
        """Stage 1 in closed form, stage 2 by training, then what hardens them; each concept's parts are kept apart."""
        ctx = replace(ctx, concepts=tuple(self._widened(ctx, concept) for concept in ctx.concepts))
        refined = self.refine(ctx)
        adapters = self.finetune(ctx, refined) if self.config.steps else {}
        refined = self._hardened(ctx, refined, adapters)
        deltas: dict[str, dict[str, Deltas]] = {}
        for name, delta in refined.items():
            deltas.setdefault(name, {})["refine"] = delta
        for name, delta in adapters.items():
            deltas.setdefault(name, {})["adapter"] = delta
        return Erasure.of(ctx, method=self.name, config=self.config.model_dump(), deltas=deltas)

    def _hardened(self, ctx: RunContext, refined: dict[str, Deltas], adapters: Mapping[str, Deltas]) -> dict[str, Deltas]:
        """The closed-form part of each concept after the stages of `robustify`, which see the adapters too."""
        trained = {f"adapter of {name}": delta for name, delta in adapters.items()}
        for name in self.config.robustify:
            total = ctx.component("robustify", name)(ctx, {**refined, **trained}, self.config)
            refined = {concept.name: total[concept.name] for concept in ctx.concepts}
        return refined

    def _widened(self, ctx: RunContext, concept: Concept) -> Concept:
        """A concept with the other words for it that the text encoder names; proper names have none."""
        if concept.kind in ("identity", "style"):
            return concept
        words = near_words(ctx.backbone, concept, self.config.near_words)
        return concept.model_copy(update={"phrases": (*concept.phrases, *words)})

    # Stage 1

    def refine(self, ctx: RunContext) -> dict[str, Deltas]:
        """The closed-form part of each concept, damped by eta; empty without a refinement."""
        solve = ctx.component("refine", self.config.refine)
        shares: dict[str, list[TextEdit]] = {}
        for reads in sorted({site.reads for site in ctx.backbone.text_sites()}):
            embeddings, sizes = self._embeddings(ctx, reads)
            edit = solve(embeddings, self.config)
            if edit is None:
                return {}
            shares[reads] = [share.compressed() for share in edit.split(sizes)]
        refined = site_deltas(ctx, shares, site_weights(ctx.backbone))
        eta = self.config.eta
        if eta is None:
            eta = choose_eta(ctx, concatenate_deltas(list(refined.values())))
        return {name: scale(delta, eta) for name, delta in refined.items()}

    def _embeddings(self, ctx: RunContext, reads: str) -> tuple[Embeddings, list[int]]:
        """Embeddings of all concepts, one after the other, and how many rows each has."""
        encode, pairs = ctx.backbone.encode, []
        for concept in ctx.concepts:
            prompts = concept_prompts(concept, ctx.prompts("erase"))
            pairs.append(paired(encode(prompts), encode([concept.neutralise(p) for p in prompts]), reads))
        preserve, captions = (encode([p.text for p in ctx.prompts(which)]) for which in ("preserve", "captions"))
        concepts, neutrals = zip(*pairs, strict=True)
        kept, seen = (rows(cond, reads) for cond in (preserve, captions))
        return Embeddings(torch.cat(concepts), torch.cat(neutrals), kept, seen), [len(c) for c in concepts]

    # Stage 2

    def finetune(self, ctx: RunContext, refined: Mapping[str, Deltas]) -> dict[str, Deltas]:
        """Train the bank of LoRAs on top of the refined weights, against the untouched teacher."""
        with self.student(ctx, refined) as (bank, step, parameters):
            train(step, parameters, self.config, ctx=ctx, name="trace")
            return {name: bank.deltas(name) for name in bank.names}

    @contextmanager
    def student(
        self, ctx: RunContext, refined: Mapping[str, Deltas]
    ) -> Iterator[tuple[AdapterBank, TraceStep, list[torch.nn.Parameter]]]:
        """The refined denoiser with its bank, the losses of a step, and what they train; the base is back at the end."""
        pools = [self._concept_pool(ctx, concept) for concept in ctx.concepts]
        clean = self._clean_pool(ctx)
        pairs = self._pair_pools(ctx) if self.config.integration == "pairs" else {}
        divergences = [
            [ctx.component("divergence", name)(ctx, concept, pool) for name in self.config.divergence]
            for concept, pool in zip(ctx.concepts, pools, strict=True)
        ]
        adapters: list[Adapter] = ctx.component("bank", self.config.bank)(ctx.concepts, self.config)
        targets = ctx.backbone.lora_targets(self.config.scope)
        whole = concatenate_deltas(list(refined.values()))
        with merged(ctx.backbone.denoiser, whole), AdapterBank(ctx.backbone) as bank:
            for adapter in adapters:
                bank.add(adapter.name, targets, adapter.rank, ctx.generator(f"trace/init/{adapter.name}"))
            parameters = [p for adapter in adapters for p in bank.train_only(adapter.name)]
            yield bank, TraceStep(self.config, ctx, bank, adapters, pools, clean, pairs, divergences), parameters

    def _concept_pool(self, ctx: RunContext, concept: Concept) -> Pool:
        prompts = concept_prompts(concept, ctx.prompts("erase"))
        encode = ctx.backbone.encode
        seeds = _seeds(ctx, f"trace/concept/{concept.name}", self.config.trajectories)
        neutral = encode([concept.neutralise(p) for p in prompts])
        tau0 = {"full": 0.0, "early": 0.0}.get(self.config.window, self.config.tau0)
        turn = {"tau0": tau0, "eta_neg": self.config.eta_neg}
        return target_pool(ctx.backbone, ctx.protocol, encode(prompts), neutral, seeds, **turn)

    def _clean_pool(self, ctx: RunContext) -> Pool:
        n = self.config.clean_trajectories
        kept, seen = ([p.text for p in ctx.prompts(which)] for which in ("preserve", "captions"))
        texts = [p for pair in zip(itertools.cycle(kept or seen), seen, strict=False) for p in pair][:n]
        return clean_pool(ctx.backbone, ctx.protocol, ctx.backbone.encode(texts), _seeds(ctx, "trace/clean", n))

    def _pair_pools(self, ctx: RunContext) -> dict[tuple[int, int], Pool]:
        """For every two concepts, trajectories of prompts that hold both."""
        pools, encode = {}, ctx.backbone.encode
        for i, j in itertools.combinations(range(len(ctx.concepts)), 2):
            a, b = ctx.concepts[i], ctx.concepts[j]
            *prompts, neutral = (encode(texts) for texts in _pair_texts(ctx, i, j))
            seeds = _seeds(ctx, f"trace/pair/{a.name}/{b.name}", max(2, self.config.trajectories // 8))
            pools[i, j] = pair_pool(ctx.backbone, ctx.protocol, prompts, neutral, seeds)
        return pools


class TraceStep:
    """The losses of one training step; concepts take turns, and only the adapter of the one in turn is trained."""

    def __init__(
        self,
        config: TraceConfig,
        ctx: RunContext,
        bank: AdapterBank,
        adapters: Sequence[Adapter],
        pools: Sequence[Pool],
        clean: Pool,
        pairs: Mapping[tuple[int, int], Pool],
        divergences: Sequence[Sequence[Any]],
    ) -> None:
        """Keep what a step draws from; `divergences` holds those of each concept."""
        self.config, self.bank, self.clean, self.pairs = config, bank, clean, pairs
        self.predict, self.to_x0 = ctx.predict, ctx.backbone.to_x0
        self.pools, self.divergences = pools, divergences
        self.owner = {i: adapter.name for adapter in adapters for i in adapter.concepts}
        window = ctx.component("window", config.window)(config)
        anchor = (lambda tau: torch.ones_like(tau)) if config.early_anchor else window
        self.weights = [anchor(pool.tau) for pool in pools]
        self.window = window

    def __call__(self, batch: int, generator: torch.Generator) -> Losses:
        """The named losses of batch number `batch`."""
        config = self.config
        step = batch // config.accumulate  # the parts of a step's batch belong to one concept
        turn, round_ = step % len(self.pools), step // len(self.pools)
        self.bank.train_only(self.owner[turn])
        erase = self.pools[turn].sample(config.batch, generator, self.weights[turn])
        keep = self.clean.sample(config.batch, generator)
        cond = [erase.cond, keep.cond]
        prediction, kept = self._student([erase.x, keep.x], [erase.tau, keep.tau], cond)
        target, weight = erase.predictions[:, 2], self.window(erase.tau)
        if config.early_anchor:
            before = (erase.tau < config.tau0 - 1e-6).to(target.device).view(-1, *[1] * (target.dim() - 1))
            target, weight = torch.where(before, erase.predictions[:, 0], target), torch.ones_like(weight)
        out = {
            "erase": losses.weighted_error(prediction, target, weight),
            "preserve": config.preserve
            * losses.weighted_error(kept, keep.predictions[:, 0], losses.preserve_weight(keep.tau, config.preserve_early)),
        }
        if self.divergences[turn] and round_ % config.divergence_every == 0:
            x0, goal = (self.to_x0(y, erase.x, erase.tau) for y in (prediction, target))
            for name, divergence in zip(config.divergence, self.divergences[turn], strict=True):
                out[name] = config.divergence_weight * divergence(x0, goal)
        if self.pairs and round_ % config.integration_every == 0:
            out["integration"] = config.integration_weight * self._integration(turn, generator)
        return out

    def _student(
        self, x: Sequence[torch.Tensor], tau: Sequence[torch.Tensor], cond: Sequence[Conditioning]
    ) -> tuple[torch.Tensor, ...]:
        """Predictions for several batches of equal size in one pass."""
        return self.predict(torch.cat(list(x)), torch.cat(list(tau)), concatenate(cond)).chunk(len(x))

    def _integration(self, turn: int, generator: torch.Generator) -> torch.Tensor:
        mine = [pair for pair in self.pairs if turn in pair]
        pool = self.pairs[mine[int(torch.randint(len(mine), (1,), generator=generator))]]
        n, third = max(2, self.config.batch // 2), len(pool.cond) // 3
        index = torch.randint(len(pool), (n,), generator=generator)
        x, tau, row = pool.x[index].to(pool.device), pool.tau[index], pool.row[index]
        one, two, neutral = pool.predictions[index].to(pool.device).unbind(1)
        both = self.predict(x, tau, pool.cond[row])
        with torch.no_grad():
            alone = self._student([x, x], [tau, tau], [pool.cond[row + third], pool.cond[row + 2 * third]])
        joint = torch.stack([losses.presence(both, c, neutral) for c in (one, two)])
        single = torch.stack([losses.presence(y, c, neutral) for y, c in zip(alone, (one, two), strict=True)])
        return losses.integration(joint, single)


@torch.no_grad()
def choose_eta(ctx: RunContext, refined: Deltas) -> float:
    """The damping with the least residual concept plus drift, on validation prompts (section 4.1).

    All are relative errors of predictions along the teacher's trajectories. Residual of a concept prompt: how far f'(c_w)
    still is from f(c_u), in units of |f(c_w) - f(c_u)|. Residual of a synonym, which has no neutral prompt of its own: how
    much of f(c_s) - f(neutral) is left along that direction. Drift: how far f'(q) has moved for preserved q, in units of
    |f(q) - f(0)|. Guidance multiplies each by its scale; what is as large as the concept itself counts as 1.
    """
    encode = ctx.backbone.encode
    protocol = ctx.protocol.model_copy(update={"steps": max(4, ctx.protocol.steps // 3)})
    erase, synonyms = (ctx.prompts(which, "validation")[:24] for which in ("erase", "synonyms"))
    keep = [p.text for p in ctx.prompts("preserve", "validation")][:24]
    neutral_of = {concept.name: concept.neutral for concept in ctx.concepts}
    neutral = [_neutralised(ctx, p.text) for p in erase] + [neutral_of[p.concept] for p in synonyms]
    prompts, empty = [*erase, *synonyms], encode([""])
    concept = encode([p.text for p in prompts])
    pool = target_pool(ctx.backbone, protocol, concept, encode(neutral), [p.seed for p in prompts])
    kept = clean_pool(ctx.backbone, protocol, encode(keep), _seeds(ctx, "trace/eta", len(keep)))
    with_concept, without = pool.predictions[:, 0], pool.predictions[:, 1]
    named = pool.row < len(erase)
    span = (with_concept - without)[named].square().mean()
    nothing = ctx.predict(kept.x, kept.tau, empty.repeat(len(kept)))
    reach = (kept.predictions[:, 0] - nothing).square().mean()
    gain = max(1.0, protocol.guidance) ** 2

    def error(change: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        return (gain * change.flatten(1).square().mean(1) / unit).clamp(max=1).mean()

    best, choice = math.inf, 1.0
    for eta in ETAS:
        with merged(ctx.backbone.denoiser, scale(refined, eta)):
            left = ctx.predict(pool.x, pool.tau, pool.cond[pool.row])
            moved = ctx.predict(kept.x, kept.tau, kept.cond[kept.row])
        cost = error((left - without)[named], span) + error(moved - kept.predictions[:, 0], reach)
        if synonyms:
            remains = losses.presence(left, with_concept, without)[~named]
            cost = cost + (gain * remains.square()).clamp(max=1).mean()
        if cost < best - 1e-6:
            best, choice = cost.item(), eta
    return choice


def _pair_texts(ctx: RunContext, i: int, j: int) -> list[list[str]]:
    """Prompts that hold two concepts, those of each alone, and their neutral form, row by row."""
    a, b = ctx.concepts[i], ctx.concepts[j]
    phrases = (f"{a.phrases[0]} and {b.phrases[0]}", a.phrases[0], b.phrases[0])
    both, *alone = ([t.format(phrase) for t in a.templates] for phrase in phrases)
    return [both, *alone, [_neutralised(ctx, text) for text in both]]


def _neutralised(ctx: RunContext, prompt: str) -> str:
    """The prompt with the neutral words of all concepts."""
    for concept in ctx.concepts:
        prompt = concept.neutralise(prompt)
    return prompt


def _seeds(ctx: RunContext, name: str, n: int) -> list[int]:
    return torch.randint(2**31, (n,), generator=ctx.generator(name)).tolist()
