"""Safe Latent Diffusion: a third prediction, for the concept, bends the conditional one away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.backbones.schedule import is_late
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.guidance import Guidance, Step, away_text
from erasekit.methods.context import RunContext
from erasekit.methods.method import Method, MethodConfig


class Strength(MethodConfig):
    """How strong the guidance is.

    The defaults are the paper's Hyp-Medium, which are those of the published code (ml-research/safe-latent-diffusion) too; its
    warm-up is 10 of 50 steps.
    """

    safety_scale: float = Field(
        1000.0, gt=0, description="s_S, how soon a difference to the concept counts in full (published: 1000)"
    )
    threshold: float = Field(
        0.01, description="lambda, how far from the concept a value may be and still be bent (published: 0.01)"
    )
    warmup: float = Field(
        0.2, ge=0, le=1, description="delta, the share of the way before which nothing is bent (published: 0.2)"
    )
    momentum_scale: float = Field(0.3, ge=0, le=1, description="s_m, weight of the momentum (published: 0.3)")
    momentum: float = Field(0.4, ge=0, lt=1, description="beta, how slowly the momentum forgets (published: 0.4)")


class SldConfig(Strength):
    """Settings of Safe Latent Diffusion."""

    text: str = Field("", description="what is steered away from; left out, the phrases of the concepts")


WEAK = {"safety_scale": 200.0, "threshold": 0.0, "warmup": 0.3, "momentum_scale": 0.0, "momentum": 0.0}
MEDIUM = {"safety_scale": 1000.0, "threshold": 0.01, "warmup": 0.2, "momentum_scale": 0.3, "momentum": 0.4}
STRONG = {"safety_scale": 2000.0, "threshold": 0.025, "warmup": 0.14, "momentum_scale": 0.5, "momentum": 0.7}
# What erased the objects of the mini world on validation prompts: nothing is held back.
MINI = {"safety_scale": 1000.0, "threshold": 1.0, "warmup": 0.0, "momentum_scale": 0.25, "momentum": 0.5}
MAX = {"safety_scale": 5000.0, "threshold": 1.0, "warmup": 0.0, "momentum_scale": 0.5, "momentum": 0.7}


class Sld(Method):
    """Safe Latent Diffusion (arXiv:2211.05105), for any concept, with all concepts in one text.

    No weight changes, and whoever leaves it out has the base model. On FLUX.1, whose predictions are guided already, they
    take the place of the guided noise estimates; that is erasekit's adaptation. Nobody has published settings for it, so it
    has those of Stable Diffusion.
    """

    name = "sld"
    Config = SldConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd15-mini": MINI, "flux-mini": MINI}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"weak": WEAK, "medium": MEDIUM, "strong": STRONG, "max": MAX}
    config: SldConfig
    seeded = False

    def texts(self, ctx: RunContext) -> list[str]:
        """Also the text that is steered away from."""
        return [*super().texts(ctx), away_text(ctx.concepts, self.config.text)]

    def erase(self, ctx: RunContext) -> Erasure:
        """Encode the text."""
        config = self.config
        settings = config.model_dump(exclude={"text"})
        guidance = Guidance.away_from(ctx.backbone, ctx.concepts, config.text, scheme=self.name, settings=settings)
        return self.erasure(ctx, guidance=guidance)


class Scheme:
    """f(0) and f(c) - gamma, so that classifier-free guidance gives f(0) + s (f(c) - f(0) - gamma), Eq. 3 of the paper."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """The settings are those of `Strength`."""
        self.strength = Strength(**settings)

    def __call__(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Bend f(c) by gamma = mu (f(S) - f(0)) + s_m nu, with momentum nu (Eqs. 4 to 8), once the warm-up is over."""
        none, wanted, concept = step.predict("none", "wanted", "concept")
        strength, nu = self.strength, step.memory.get("nu", torch.zeros_like(none))
        gamma = scale_of(wanted, concept, strength) * (concept - none) + strength.momentum_scale * nu
        step.memory["nu"] = strength.momentum * nu + (1 - strength.momentum) * gamma
        return none, wanted - gamma if is_late(step.tau, strength.warmup) else wanted


def scale_of(wanted: torch.Tensor, concept: torch.Tensor, strength: Strength) -> torch.Tensor:
    """Mu of Eq. 6: s_S |f(c) - f(S)| up to 1 where f(c) - f(S) < lambda, else 0; elementwise."""
    difference = wanted - concept
    mu = (strength.safety_scale * difference).abs().clamp(max=1)
    return torch.where(difference < strength.threshold, mu, torch.zeros_like(mu))
