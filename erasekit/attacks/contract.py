"""What every attack owes, for its author's tests."""

from __future__ import annotations

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
from erasekit.erasures.erasure import Erasure
from erasekit.evaluation.evaluators import Batch, Evaluator, Scores
from erasekit.evaluation.tasks import Prompt
from erasekit.methods.context import RunContext


def check(
    kind: type[Attack],
    ctx: RunContext,
    erasure: Erasure | None,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
) -> list[Outcome]:
    """Try an attack twice on an erased model, under a judge that never sees the concept, and hold it against its contract.

    It names itself and what it knows, describes its settings, encodes no text that `texts` does not name, draws no more
    than its budget, finds the same both times, and leaves the model as it was.

    Args:
        kind: the attack.
        ctx: backbone, concepts, task and protocol.
        erasure: None for the unedited model.
        prompts: some that ask for the concepts.
        folder: an empty one, for what is found.
        settings: of the attack, to keep it short.

    Raises:
        AssertionError: says what it does not keep.
    """
    assert kind.name, "it has no name"
    assert kind.knows in KNOWS, f"it knows '{kind.knows}', which is none of {', '.join(KNOWS)}"
    assert issubclass(kind.Config, AttackConfig), "its Config does not derive from AttackConfig"
    undescribed = [name for name, field in kind.Config.model_fields.items() if not field.description]
    assert not undescribed, f"its setting '{undescribed[0]}' has no description"
    backbone, usual = ctx.backbone, kind.defaults
    layers = (usual.get(backbone.capabilities.family, {}), usual.get(backbone.name, {}), settings or {})
    config = kind.Config(**{key: value for layer in layers for key, value in layer.items()})
    own = [(c, [p for p in prompts if p.concept == c.name]) for c in ctx.concepts]
    named = [text for concept, of in own for text in kind(config).texts(concept, of)]
    backbone.encode(["", *(p.text for p in prompts), *named])
    found, drawn = [], []
    for run in ("first", "second"):
        model = ErasedModel(ctx, erasure)
        try:
            with model.base(), _nothing_encoded(backbone):
                examples = {i: latents(model, Draw(backbone.encode([p.text]), [p.seed])) for i, p in enumerate(prompts)}
                passes = model.passes
            with _nothing_encoded(backbone):
                campaign = Campaign(
                    model, prompts, [False] * len(prompts), examples, Judge("contract", [_Never()]), folder / run
                )
                found.append(campaign.run(kind.name, kind(config)))
            assert kind.knows in ("nothing", "text encoder") or model.passes > passes, "it never asks the model"
        finally:
            model.close()
        drawn.append([path.read_bytes() for path in sorted((folder / run / kind.name).glob("*.png"))])
    assert backbone.unchanged(), "it leaves something on the denoiser"
    assert not any(p.requires_grad for p in backbone.denoiser.parameters()), "it leaves gradients on"
    assert all(outcome.queries <= config.queries for outcome in found[0]), "it draws more than its budget"
    assert drawn[0] == drawn[1], "the same settings and seed gave other images"
    return found[0]


class _Never(Evaluator):
    """Sees no concept anywhere, so that an attack spends all of its budget."""

    name = "never"

    def __init__(self) -> None:
        """No image was seen."""
        self._rows: list[dict[str, Any]] = []

    def update(self, batch: Batch) -> None:
        """See nothing."""
        assert batch.images.dtype == torch.uint8
        self._rows += [{"shown": False, "score": 0.0}] * len(batch.images)

    def compute(self) -> Scores:
        """A row per image."""
        return Scores(self._rows)


@contextmanager
def _nothing_encoded(backbone: Backbone) -> Iterator[None]:
    """Refuse texts that were not encoded before, as a large model does once its text encoders are gone."""
    known: dict[str, Any] = getattr(backbone, "_encoded", {})
    own, before = backbone.encode, set(known)

    def encode(prompts: Sequence[str]) -> Any:
        unknown = [p for p in prompts if p not in before] if before else []
        assert not unknown, f"it encodes '{unknown[0]}', which its `texts` does not name"
        return own(prompts)

    backbone.encode = encode  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backbone.encode
