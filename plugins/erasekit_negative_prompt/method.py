"""The negative prompt as a method: what costs nothing, and whatever erases has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from erasekit.erasures.erasure import Erasure
from erasekit.erasures.guidance import Guidance, Step, away_text
from erasekit.methods.context import RunContext
from erasekit.methods.method import Method, MethodConfig


class NegativePromptConfig(MethodConfig):
    """Settings of the negative prompt."""

    text: str = Field("", description="what is steered away from; left out, the phrases of the concepts")
    scale: float = Field(
        2.0,
        ge=1,
        description="scale of true guidance where the model's own is embedded (FLUX.1, for which none is published: low, since "
        "it comes on top of the embedded one); elsewhere the protocol's, as published",
    )


class NegativePrompt(Method):
    """Negative prompting, with all concepts in one text: f(concept) + s (f(c) - f(concept)).

    No weight changes, and whoever leaves it out has the base model.
    """

    name = "negative-prompt"
    Config = NegativePromptConfig
    config: NegativePromptConfig
    seeded = False

    def texts(self, ctx: RunContext) -> list[str]:
        """Also the text that is steered away from."""
        return [*super().texts(ctx), away_text(ctx.concepts, self.config.text)]

    def erase(self, ctx: RunContext) -> Erasure:
        """Encode the text."""
        guidance = Guidance.away_from(
            ctx.backbone, ctx.concepts, self.config.text, scheme=self.name, settings={}, scale=self.config.scale
        )
        return self.erasure(ctx, guidance=guidance)


class Scheme:
    """The concept's prediction in the place of the unconditional one."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """There are no settings."""

    def __call__(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """f(concept) and f(c)."""
        concept, wanted = step.predict("concept", "wanted")
        return concept, wanted
