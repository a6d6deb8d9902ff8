"""TRACE: closed-form refinement, then LoRAs trained on the late part of the teacher's semi-target trajectories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch

from erasekit.backbones.memory import LORA_GB, Footprint
from erasekit.concepts import Concept
from erasekit.erasures.deltas import Deltas, merged, scale, summed
from erasekit.erasures.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.evaluation.tasks import Prompt
from erasekit.events import note
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.closedform import TextEdit
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.method import Method
from erasekit.methods.near_words import near_words
from erasekit.methods.prompts import concept_pairs, neutral_of
from erasekit.methods.sites import site_deltas, site_embeddings, site_weights
from erasekit.methods.training import train
from erasekit.methods.trajectories import Pool
from erasekit_trace.config import TraceConfig
from erasekit_trace.eta import choose_eta
from erasekit_trace.pool import clean_pool, pair_pool, target_pool
from erasekit_trace.slots import Adapter
from erasekit_trace.step import TraceStep

LEAST_ETA = 0.3  # a smaller damping is a warning
LARGE = ("flux", "flux-schnell", "sd35-medium", "sd35-large", "flux2-klein-base-4b", "flux2-klein-base-9b")


class Trace(Method):
    """TRACE (arXiv:2505.23312), with the paper's open ends closed so that it can be run (docs/explanation.md).

    Stage 1 edits the layers that read text so that prompts of the concept act like their neutral prompts, damped by eta.
    Stage 2 trains a LoRA for each concept on the late part of the teacher's semi-target trajectories, and holds clean
    prompts where they were. Each part is a slot with several components.
    """

    name = "trace"
    version = 4  # the LoRAs of several concepts do not grow against each other
    Config = TraceConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dit": {"scope": "qk_dual"},
        # On validation prompts ("dog", sd15-mini) 120 steps left and moved no less than 60.
        **{name: {"steps": 60, "batch": 16} for name in ("sd15-mini", "flux-mini")},
        # Every trajectory of FLUX.1 is 28 steps of three predictions, of SD3.5 medium 40, of FLUX.2 50.
        **{name: {"trajectories": 8, "clean_trajectories": 24} for name in LARGE},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Against learned words too: see docs/attacks.md.
        "robust": {"robustify": ("blind",)},
        # Sections 4.1 to 4.3. Where the paper leaves a choice, docs/explanation.md says which one this is.
        "paper": {
            "refine": "eq1",
            "e_u": "end",
            "near_words": 0,
            "window": "late",
            "eta_neg": 1.0,
            "divergence": ("probe",),
            "bank": "per-concept",
            "scope": "kv",
            "rank": 4,
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
    curves: ClassVar[Mapping[str, str]] = {
        "erase": "how far the prediction for the concept is from the teacher's for its neutral words, late in the trajectory",
        "preserve": "how far predictions for everything else have moved from the teacher's",
        "integration": "how much more of two erased concepts is left when one prompt asks for both",
        "probe": "the same as erase, seen by a classifier on the image that the prediction implies",
        "clip": "the same as erase, seen by a CLIP on the image that the prediction implies",
        "lpips": "the same as erase, as a distance between the images that the predictions imply",
        "recovered": "of the concept, how much each round's closed-form embedding brought back",
    }
    config: TraceConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Concept and clean points in one pass, and a pass for two concepts beside it."""
        config = self.config
        joint = max(2, config.batch // 2) if config.integration == "pairs" and len(plan.concepts) > 1 else 0
        rows = 2 * config.batch + joint if config.steps else 0
        return Footprint(rows=rows, trained_gb=LORA_GB * len(plan.concepts))

    def texts(self, ctx: RunContext) -> list[str]:
        """Also the words that the text encoder names, and prompts with two concepts."""
        ctx = replace(ctx, concepts=tuple(self._widened(ctx, concept) for concept in ctx.concepts))
        pairs = [texts for i, j in _ring(len(ctx.concepts)) for texts in _pair_texts(ctx, i, j)]
        return [*super().texts(ctx), *(text for texts in pairs for text in texts)]

    def check(self, plan: Planned) -> None:
        """The window has to hold a step of the sampler."""
        early = math.ceil(self.config.tau0 * plan.protocol.steps - 1e-6)
        steps = {"late": plan.protocol.steps - early, "early": early}.get(self.config.window, 1)
        if self.config.steps and steps < 1:
            raise UsageError(
                f"The window '{self.config.window}' holds none of {plan.protocol.steps} sampling steps at 'method.tau0' "
                f"{self.config.tau0:g}. Change one of them, or use '-s method.window=full'."
            )

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
        figures = {"eta": ctx.shared.get("eta"), "words": {c.name: c.phrases for c in ctx.concepts}}
        return self.erasure(ctx, deltas=deltas, figures=figures)

    def _hardened(self, ctx: RunContext, refined: dict[str, Deltas], adapters: Mapping[str, Deltas]) -> dict[str, Deltas]:
        """The closed-form part of each concept after the stages of `robustify`, which see the adapters too."""
        trained = {f"adapter of {name}": delta for name, delta in adapters.items()}
        for name in self.config.robustify:
            total = ctx.component("robustify", name)(ctx, {**refined, **trained}, self.config)
            refined = {concept.name: total[concept.name] for concept in ctx.concepts}
        return refined

    def _widened(self, ctx: RunContext, concept: Concept) -> Concept:
        """A concept with the other words for it that the text encoder names.

        Proper names have none. Explicit content has its own phrases, and nothing of its kind is preserved beside them.
        """
        if concept.kind not in ("object", "free") or not self.config.near_words:
            return concept
        if not concept.preserve:
            note(
                f"No other words for '{concept.name}' are looked for: nothing of its kind is preserved. Name some: --preserve."
            )
        words = near_words(ctx.backbone, concept, self.config.near_words)
        ctx.shared.setdefault("told", {})[concept.name] = len(concept.phrases) / (len(concept.phrases) + len(words))
        note(f"Erased with '{concept.name}', as the text encoder reads them alike: {', '.join(words) or 'nothing'}.")
        return concept.model_copy(update={"phrases": (*concept.phrases, *words)})

    # Stage 1

    def refine(self, ctx: RunContext) -> dict[str, Deltas]:
        """The closed-form part of each concept, damped by eta; empty without a refinement."""
        solve = ctx.component("refine", self.config.refine)
        shares: dict[str, list[TextEdit]] = {}
        # A concept weighs as much as before its words were added, so that they take nothing from what is preserved.
        weights = {name: [told] for name, told in ctx.shared.get("told", {}).items()}
        for reads, embeddings in site_embeddings(ctx, shares=weights).items():
            edits = solve(embeddings, self.config)
            if edits is None:
                return {}
            shares[reads] = edits
        refined = site_deltas(ctx, shares, site_weights(ctx.backbone))
        eta = self.config.eta
        if eta is None:
            eta = choose_eta(ctx, summed(list(refined.values())))
        ctx.shared["eta"] = eta
        if eta < LEAST_ETA:
            ctx.warn(f"Stage 1 is nearly off (eta {eta:g}): '{self.config.refine}' moves what must stay more than the concept.")
        return {name: scale(delta, eta) for name, delta in refined.items()}

    # Stage 2

    def finetune(self, ctx: RunContext, refined: Mapping[str, Deltas]) -> dict[str, Deltas]:
        """Train the bank of LoRAs on top of the refined weights, against the untouched teacher."""
        together = self.config.model_copy(update={"steps": self.config.steps * len(ctx.concepts)})
        with self.student(ctx, refined) as (bank, step, parameters):
            train(step, parameters, together, ctx=ctx, name="trace", predict=step.student)
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
        whole = summed(list(refined.values()))
        with merged(ctx.backbone.denoiser, whole), AdapterBank(ctx.backbone) as bank:
            for adapter in adapters:
                bank.add(adapter.name, targets, adapter.rank, ctx.generator(f"trace/init/{adapter.name}"))
            parameters = [p for adapter in adapters for p in bank.train_only(adapter.name)]
            yield bank, TraceStep(self._window(ctx), ctx, bank, adapters, pools, clean, pairs, divergences), parameters

    def _window(self, ctx: RunContext) -> TraceConfig:
        """The settings with tau0 as progress: the schedule says where so large a share of its steps is over."""
        schedule = ctx.backbone.schedule(ctx.protocol.steps, ctx.protocol.size)
        return self.config.model_copy(update={"tau0": schedule.progress(self.config.tau0)})

    def _concept_pool(self, ctx: RunContext, concept: Concept) -> Pool:
        """Semi-target trajectories of one concept; many concepts get fewer each, so that memory stays the same."""
        prompts, neutral = (list(side) for side in zip(*concept_pairs(concept, ctx.prompts("erase")), strict=True))
        n = max(4, min(self.config.trajectories, 4 * self.config.trajectories // len(ctx.concepts)))
        seeds, encode = _seeds(ctx, f"trace/concept/{concept.name}", n), ctx.backbone.encode
        tau0 = {"full": 0.0, "early": 0.0}.get(self.config.window, self._window(ctx).tau0)
        turn = {"tau0": tau0, "eta_neg": self.config.eta_neg}
        return target_pool(ctx.backbone, ctx.protocol, encode(prompts), encode(neutral), seeds, **turn)

    def _clean_pool(self, ctx: RunContext) -> Pool:
        n = self.config.clean_trajectories
        kept, seen = ([p.text for p in ctx.prompts(which)] for which in ("preserve", "captions"))
        texts = [p for pair in zip(itertools.cycle(kept or seen), seen, strict=False) for p in pair][:n]
        return clean_pool(ctx.backbone, ctx.protocol, ctx.backbone.encode(texts), _seeds(ctx, "trace/clean", n))

    def _pair_pools(self, ctx: RunContext) -> dict[tuple[int, int], Pool]:
        """Trajectories of prompts that hold two concepts: each concept with the next one, in a ring."""
        pools, encode = {}, ctx.backbone.encode
        n = max(2, min(self.config.trajectories // 8, self.config.trajectories // (2 * len(ctx.concepts))))
        for i, j in _ring(len(ctx.concepts)):
            a, b = ctx.concepts[i], ctx.concepts[j]
            *prompts, neutral = (encode(texts) for texts in _pair_texts(ctx, i, j))
            seeds = _seeds(ctx, f"trace/pair/{a.name}/{b.name}", n)
            pools[i, j] = pair_pool(ctx.backbone, ctx.protocol, prompts, neutral, seeds)
        return pools


def _pair_texts(ctx: RunContext, i: int, j: int) -> list[list[str]]:
    """Prompts that hold two concepts, those of each alone, and their neutral form, row by row."""
    a, b = ctx.concepts[i], ctx.concepts[j]
    phrases = (f"{a.phrases[0]} and {b.phrases[0]}", a.phrases[0], b.phrases[0])
    both, *alone = ([t.format(phrase) for t in a.templates] for phrase in phrases)
    return [both, *alone, [neutral_of(Prompt(text, 0, concept=f"{a.name}+{b.name}"), ctx.concepts) for text in both]]


def _ring(n: int) -> list[tuple[int, int]]:
    """Each of `n` with the next one, and the last with the first: all pairs of up to three, and never more than `n`."""
    return sorted({(min(i, j), max(i, j)) for i, j in ((i, (i + 1) % n) for i in range(n)) if i != j})


def _seeds(ctx: RunContext, name: str, n: int) -> list[int]:
    return torch.randint(2**31, (n,), generator=ctx.generator(name)).tolist()
