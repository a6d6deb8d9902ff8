"""Classifier guidance (arXiv:2505.17013): what scores images for the concept pulls every step towards it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.evaluation.tasks import Prompt


class ClassifierGuidanceConfig(AttackConfig):
    """Settings."""

    queries: int = Field(4, ge=1, description="images of a prompt at most, pulled more and more strongly")
    scale: float = Field(0.4, gt=0, description="length of the pull in the last image, as a share of the prediction's")


class ClassifierGuidance(Attack):
    """The gradient of a CLIP's cosine between the one-step x0 and the concept's name, added to the guided prediction.

    The CLIP is the `scorer` of the model's domain, never the evaluator that judges the image.
    """

    name = "classifier-guidance"
    kind = "probe"
    Config = ClassifierGuidanceConfig
    config: ClassifierGuidanceConfig

    def __init__(self, config: Any) -> None:
        """The scorer is loaded with the first prompt."""
        super().__init__(config)
        self._scorer: Any = None

    @contextmanager
    def ready(self, target: Target) -> Iterator[None]:
        """Load the scorer."""
        self._scorer = target.ctx.component("scorer", target.backbone.domain)()
        yield

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """One image after the other."""
        cond, text = target.encode([prompt.text]), self._scorer.text([target.concept.phrases[0]]).to(target.backbone.device)
        for i in range(self.config.queries):
            scale = self.config.scale * (i + 1) / self.config.queries

            def bend(x: torch.Tensor, tau: torch.Tensor, prediction: torch.Tensor, scale: float = scale) -> torch.Tensor:
                prediction = prediction.detach().requires_grad_()
                image = target.backbone.decode(target.backbone.to_x0(prediction, x, tau))
                (pull,) = torch.autograd.grad((self._scorer.image(image) @ text.T).sum(), prediction)
                pulled: torch.Tensor = prediction + scale * prediction.norm() * pull / pull.norm().clamp_min(1e-12)
                return pulled

            yield Draw(cond, [prompt.seed], [prompt.text], bend=bend)
