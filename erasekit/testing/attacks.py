"""What every attack owes: its budget kept, the same draws twice, the model as it was, and no text that was not named."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.campaign import Campaign
from erasekit.attacks.draw import KNOWS, Draw
from erasekit.attacks.drawing import latents
from erasekit.attacks.judge import Judge
from erasekit.attacks.outcomes import Outcome
from erasekit.attacks.target import ErasedModel
from erasekit.backbones.protocol import Backbone
from erasekit.erasures.deltas import Deltas, LowRank
from erasekit.erasures.erasure import Erasure
from erasekit.evaluation.evaluators import Batch, Evaluator, Scores
from erasekit.evaluation.tasks import Prompt
from erasekit.methods.context import RunContext
from erasekit.registration.plugins import Registries
from erasekit.runs.compute import context
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.testing.worlds import BACKBONES, SAVED, Plugins, base_settings, check_fields, owe, owe_none, with_world


def check_attack(
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    plugin: Plugins = (),
    backbones: Sequence[str] = BACKBONES,
) -> None:
    """See that an attack keeps its contract: it is tried twice on each backbone, under a judge that never sees the concept.

    Args:
        name: the registered name.
        settings: of the attack, e.g. few steps, so that this takes seconds.
        plugin: the file of an attack that is not installed.
        backbones: what it is tried on; those that lack what it `requires` are left out.

    Raises:
        AssertionError: something is broken; says what, on which backbone.
        ErasekitError: the attack fails in a way that has a line of its own.
    """
    registries = with_world(plugin)
    kind = registries.attacks.get(name)
    what = f"'{name}'"
    owe(isinstance(kind, type) and issubclass(kind, Attack), f"{what} is no subclass of erasekit.Attack.")
    owe(kind.knows in KNOWS, f"{what}: it knows '{kind.knows}', which is none of {', '.join(KNOWS)}.")
    owe(issubclass(kind.Config, AttackConfig), f"{what}: Config is no subclass of erasekit.AttackConfig.")
    check_fields(what, kind.Config)
    fitting = [b for b in backbones if kind.requires <= registries.backbones.get(b).capabilities.names()]
    owe(fitting, f"{what} requires {', '.join(sorted(kind.requires))}, which none of {', '.join(backbones)} has.")
    for backbone in fitting:
        check_on(backbone, kind, settings or {}, registries)


def check_on(backbone: str, kind: type[Attack], settings: Mapping[str, Any], registries: Registries) -> None:
    """Try an attack on one backbone, with a small edit in place of an erasure."""
    what = f"'{kind.name}' on '{backbone}'"
    task = "words" if backbone in SAVED else ""
    options = {"attacks": {kind.name: dict(settings)}, "backbone": base_settings(backbone)}
    flags = {"method": "pull", "backbone": backbone, "task": task, "concepts": ("cat",), "attacks": (kind.name,)}
    plan = resolve(build(flags | {"options": options}), registries)
    ctx = context(plan, plan.backbone.load(plan.backbone_config), registries)
    prompts = ctx.task.prompts("erase", ctx.concepts, "evaluation")[:1]
    prompts += [prompts[0]._replace(seed=prompts[0].seed + 1)]
    with tempfile.TemporaryDirectory() as folder:
        campaigns(what, kind(plan.attacks[0][2]), ctx, edit(ctx), prompts, Path(folder))


def edit(ctx: RunContext) -> Erasure:
    """An erasure that changes one layer a little."""
    site = ctx.backbone.text_sites()[0].name
    rows, columns = ctx.backbone.weight(site).shape
    down = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    layers: Deltas = {site: LowRank(0.05 * torch.ones(rows, 2), down)}
    return Erasure.of(ctx.backbone, ctx.concepts, method="pull", config={}, deltas={ctx.concepts[0].name: {"edit": layers}})


def campaigns(
    what: str, attack: Attack, ctx: RunContext, erasure: Erasure | None, prompts: Sequence[Prompt], folder: Path
) -> list[Outcome]:
    """Try an attack twice, and hold both against each other and against its budget."""
    kind, backbone = type(attack), ctx.backbone
    own = [(c, [p for p in prompts if p.concept == c.name]) for c in ctx.concepts]
    backbone.encode(["", *(p.text for p in prompts), *(text for c, of in own for text in attack.texts(c, of))])
    found, drawn = [], []
    for run, together in (("first", 1), ("second", 1), ("side by side", len(prompts))):
        model = ErasedModel(ctx, erasure)
        try:
            with model.base():
                examples = {i: latents(model, Draw(backbone.encode([p.text]), [p.seed])) for i, p in enumerate(prompts)}
            passes, judge = model.passes, Judge("contract", [_Never()])
            with _nothing_encoded(what, backbone):
                campaign = Campaign(model, prompts, [False] * len(prompts), examples, judge, folder / run)
                config = attack.config.model_copy(update={"together": together})
                found.append(campaign.run(kind.name, kind(config)))
            asks = kind.knows in ("nothing", "text encoder") or model.passes > passes
            owe(asks, f"{what}: it knows '{kind.knows}' and never asks the model.")
        finally:
            model.close()
        drawn.append([path.read_bytes() for path in sorted((folder / run / kind.name).glob("*.png"))])
    owe(backbone.unchanged(), f"{what}: it leaves something on the denoiser. Undo it at the end of `ready`.")
    on = [key for key, parameter in backbone.denoiser.named_parameters() if parameter.requires_grad]
    owe_none(on, f"{what}: it left gradients on, first of '{{}}'.")
    owe(drawn[0], f"{what}: it draws no image.")
    most = max(outcome.queries for outcome in found[0])
    owe(most <= attack.config.queries, f"{what}: it draws {most} images for a prompt; its budget is {attack.config.queries}.")
    line = f"{what}: the same settings and seed gave other images. Draw all that is random from target.generator(name)."
    owe(drawn[0] == drawn[1], line)
    alone, beside = ([(o.queries, o.found) for o in outcomes] for outcomes in (found[0], found[2]))
    line = f"{what}: with '-s attacks.{kind.name}.together={len(prompts)}' it comes to something else than prompt by prompt."
    owe(alone == beside, f"{line} Set what a prompt needs of the model in `rounds` before each draw.")
    owe(not any(outcome.shown for outcome in found[0]), f"{what}: it says that a concept is shown which no judge has seen.")
    return found[0]


class _Never(Evaluator):
    """Sees no concept anywhere, so that an attack spends all of its budget."""

    name = "never"

    def __init__(self) -> None:
        """No image was seen."""
        self._rows: list[dict[str, Any]] = []

    def update(self, batch: Batch) -> None:
        """See nothing."""
        self._rows += [{"shown": False, "score": 0.0}] * len(batch.images)

    def compute(self) -> Scores:
        """A row per image."""
        return Scores(self._rows)


@contextmanager
def _nothing_encoded(what: str, backbone: Backbone) -> Iterator[None]:
    """Refuse texts that were not encoded before, as a large model does once its text encoders are gone."""
    known: dict[str, Any] = getattr(backbone, "_encoded", {})
    own, before = backbone.encode, set(known)

    def encode(prompts: Sequence[str]) -> Any:
        unknown = [p for p in prompts if p not in before] if before else []
        owe_none(unknown, f"{what}: it encodes '{{}}', which its `texts` does not name.")
        return own(prompts)

    backbone.encode = encode  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backbone.encode
