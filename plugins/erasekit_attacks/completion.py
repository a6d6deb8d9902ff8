"""Completion (arXiv:2505.17013): the unedited model begins an image, the erased one finishes it."""

from __future__ import annotations

from collections.abc import Generator

import torch
from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.evaluation.tasks import Prompt


class CompletionConfig(AttackConfig):
    """Settings."""

    queries: int = Field(1, ge=1, description="images that are drawn and judged for a prompt at most; there is one")
    tau: float = Field(0.4, ge=0, le=1, description="progress at which the erased model goes on")


class Completion(Attack):
    """The prompt's own image by the unedited model up to `tau`, then the erased model with the same prompt."""

    kind = "probe"
    knows = "erased+base"
    Config = CompletionConfig
    config: CompletionConfig

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """One image."""
        cond, backbone = target.encode([prompt.text]), target.backbone
        schedule = backbone.schedule(target.protocol.steps, target.protocol.size)
        first, x = schedule.first_late(self.config.tau), backbone.latents([prompt.seed], target.protocol.size)
        with torch.no_grad(), target.base():
            for k in range(first):
                x = backbone.step(target.follow(x, schedule.tau[k].expand(1), cond), x, k, schedule)
        yield Draw(cond, [prompt.seed], [prompt.text], x=x, first=first)


class Completion20(Completion):
    """From a fifth of the way."""

    name = "completion-20"

    class Config(CompletionConfig):
        """Settings."""

        tau: float = Field(0.2, ge=0, le=1, description="progress at which the erased model goes on")


class Completion40(Completion):
    """From two fifths of the way."""

    name = "completion-40"


class Completion60(Completion):
    """From three fifths of the way."""

    name = "completion-60"

    class Config(CompletionConfig):
        """Settings."""

        tau: float = Field(0.6, ge=0, le=1, description="progress at which the erased model goes on")
