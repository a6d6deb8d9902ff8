"""A whole world in one plugin, small enough for tests: three backbones, a task, an evaluator and a method that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.concepts import Concept
from erasekit.erasures.erasure import Erasure
from erasekit.errors import unknown
from erasekit.evaluation.evaluators import Batch, Evaluator, Scores
from erasekit.evaluation.intervals import wilson
from erasekit.evaluation.results import Metric
from erasekit.evaluation.tasks import Prompt, Protocol, Split, Task
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.method import Method
from erasekit.methods.training import Losses, TrainingConfig, train
from erasekit.registration.hookspecs import Register, hookimpl
from erasekit.testing.tiny import TinySD
from erasekit.testing.tiny_flux import TinyFlux
from erasekit.testing.tiny_flux2 import TinyFlux2, TinyFlux2Base
from erasekit.testing.tiny_sd3 import TinySD3
from erasekit.testing.tiny_xl import TinyXL

SEEDS: dict[Split, int] = {"train": 0, "validation": 100, "evaluation": 200}


class Words(Task):
    """Two words and two others."""

    name = "words"
    domain = "mini"
    title = "Words of the tiny world"
    concepts = ("cat", "dog")
    evaluators = ("red",)
    protocol = Protocol(sampler="ddim", steps=2, guidance=2.0, size=16, batch=2)

    def concept(self, text: str) -> Concept:
        """`cat` or `dog`; a thing takes their place."""
        concept = Concept.parse(text)
        if concept.name not in self.concepts:
            raise unknown("concept", concept.name, self.concepts, "erasekit ls tasks")
        return concept.model_copy(update={"neutral": "thing"})

    def prompts(self, which: str, concepts: Sequence[Concept], split: Split, limit: int | None = None) -> list[Prompt]:
        """One prompt for each word of a set."""
        erased = [c.name for c in concepts]
        others = ["red", "kitten", "photo"]
        sets = {"erase": erased, "preserve": ["ship"], "clean": others, "captions": others if split == "train" else []}
        words = sets.get(which, [])
        texts = [f"a photo of a {word}" for word in words][:limit]
        return [
            Prompt(t, SEEDS[split] + i, w, which, w if w in erased else "")
            for i, (t, w) in enumerate(zip(texts, words, strict=False))
        ]

    def aggregate(self, rows: Mapping[str, Any], concepts: Sequence[Concept]) -> dict[str, Metric]:
        """The share of images of the erased words that are red."""
        values = [[r["red"] for r in rows[side] if r["set"] == "erase"] for side in ("erased", "base")]
        value, base = (sum(v) / len(v) for v in values)
        n = len(values[0])
        return {"acc_e": Metric(value=value, base=base, ci95=wilson(value, n), n=n, higher_is_better=False, evaluator="red")}


class Red(Evaluator):
    """Whether an image is more red than green."""

    name = "red"
    per_image = True

    def __init__(self) -> None:
        """Start with no images."""
        self.rows: list[dict[str, Any]] = []

    def describe(self) -> dict[str, str]:
        """There are no weights."""
        return {"model": "mean of channels", "version": self.version, "sha256": ""}

    def update(self, batch: Batch) -> None:
        """Compare the means of two channels."""
        means = batch.images.double().mean((2, 3))
        self.rows += [{"red": float(r > g), "shown": r > g, "score": r} for r, g, _ in means.tolist()]

    def compute(self) -> Scores:
        """A row per image."""
        return Scores(self.rows)


class PullConfig(TrainingConfig):
    """Settings."""

    steps: int = Field(12, ge=0, description="training steps")
    checkpoint_every: int = Field(3, ge=1, description="steps between checkpoints")
    rank: int = Field(2, ge=1, description="rank of the LoRA")
    nan_at: int = Field(-1, description="a step whose loss is not a number; -1 for none")


class Pull(Method):
    """Pulls the concept's prediction towards the neutral word's at random latents."""

    name = "pull"
    Config = PullConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"short": {"steps": 2}}
    config: PullConfig

    def texts(self, ctx: RunContext) -> list[str]:
        """Also the two words with their article."""
        return [*super().texts(ctx), *(f"a {word}" for word in (ctx.concepts[0].name, "thing"))]

    def erase(self, ctx: RunContext) -> Erasure:
        """Train one LoRA for the first concept."""
        backbone = ctx.backbone
        word, neutral = (backbone.encode([f"a {w}"]) for w in (ctx.concepts[0].name, "thing"))
        bank = AdapterBank(backbone)  # loads the denoiser, which may need the room of the text encoders
        scope = "kv" if backbone.capabilities.family == "unet" else "add_kv"
        bank.add("pull", backbone.lora_targets(scope), self.config.rank, ctx.generator("init"))

        def losses(batch: int, generator: torch.Generator) -> Losses:
            tau = torch.rand(2, generator=generator)
            latents = backbone.latents([0, 1])
            x = torch.randn(latents.shape, generator=generator).to(latents)
            with torch.no_grad(), bank.teacher():
                target = backbone.predict(x, tau, neutral.repeat(2))
            error = (backbone.predict(x, tau, word.repeat(2)) - target).square().mean()
            return {"pull": error * float("nan") if batch == self.config.nan_at else error}

        train(losses, bank.train_only("pull"), self.config, ctx=ctx, name="pull")
        deltas = {ctx.concepts[0].name: {"adapter": bank.deltas("pull")}}
        bank.remove()
        return self.erasure(ctx, deltas=deltas)


@hookimpl
def register_backbones(register: Register) -> None:
    """Register the models."""
    register("tiny", TinySD, aliases=("tiny-sd",), summary="random weights")
    register("tiny-flux", TinyFlux, summary="random weights")
    register("tiny-xl", TinyXL, summary="random weights")
    register("tiny-sd3", TinySD3, summary="random weights")
    register("tiny-flux2", TinyFlux2, summary="random weights")
    register("tiny-flux2-base", TinyFlux2Base, summary="random weights")


@hookimpl
def register_tasks(register: Register) -> None:
    """Register the task."""
    register("mini/words", Words, summary="two words")


@hookimpl
def register_evaluators(register: Register) -> None:
    """Register the evaluator."""
    register("red", Red, summary="more red than green")


@hookimpl
def register_methods(register: Register) -> None:
    """Register the method."""
    register("pull", Pull, summary="trains for a second")
