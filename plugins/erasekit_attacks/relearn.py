"""Relearning: how many steps of a LoRA on a few images bring the concept back."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.attacks.words import points
from erasekit.evaluation.tasks import Prompt
from erasekit.events import progress

NAME = "relearn"  # of the adapter


class RelearnConfig(AttackConfig):
    """Settings."""

    queries: int = Field(7, ge=1, description="images of a prompt at most: one at each of `at`")
    at: tuple[int, ...] = Field((1, 3, 5, 10, 20, 40, 80), description="steps after which images are drawn, rising")
    images: int = Field(10, ge=1, description="images of the concept that are trained on")
    lr: float = Field(1e-3, gt=0, description="rate of AdamW")
    batch: int = Field(4, ge=1, description="images in a step")
    rank: int = Field(4, ge=1, description="rank of the LoRA")
    scope: str = Field("attention", description="linear layers that carry it, a scope of the backbone")


class Relearn(Attack):
    """A LoRA on attention, trained with the concept's own prompts.

    On the unedited model, of a concept that it never saw, the same training says how soon a model learns what is new to it:
    an erasure can be no harder to undo than that.
    """

    name = "relearn"
    kind = "probe"
    counts = "LoRA steps"
    Config = RelearnConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dit": {"scope": "all_attn"}}
    config: RelearnConfig

    def __init__(self, config: Any) -> None:
        """Nothing is trained yet."""
        super().__init__(config)
        self._parameters: list[torch.nn.Parameter] = []
        self._states: list[list[torch.Tensor]] = []

    @contextmanager
    def ready(self, target: Target) -> Iterator[None]:
        """Train the LoRA, and keep what it is at each of `at`."""
        config, backbone, generator = self.config, target.backbone, target.generator("train")
        examples = target.examples[: config.images].to(backbone.device, backbone.dtype)
        asked = [prompt for prompt in target.concept.prompts() if target.concept.phrases[0] in prompt]
        cond = target.encode(asked)
        target.bank.add(NAME, backbone.lora_targets(config.scope), config.rank, target.generator("init"))
        parameters = self._parameters = target.bank.train_only(NAME)
        optimizer, self._states = torch.optim.AdamW(parameters, config.lr), []
        for step in range(1, config.at[-1] + 1):
            progress("relearning", step - 1, config.at[-1])
            x0 = examples[torch.randint(len(examples), (config.batch,), generator=generator)]
            row = torch.randint(len(asked), (config.batch,), generator=generator)
            at = points(backbone, target.protocol, x0, config.batch, generator)
            optimizer.zero_grad()
            target.loss(x0, cond[row], at.tau, at.noise).backward()
            optimizer.step()
            if step in config.at:
                self._states.append([p.detach().clone() for p in parameters])
        progress("relearning", config.at[-1], config.at[-1])
        yield

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """The prompt, at each of `at`."""
        for steps, state in zip(self.config.at, self._states, strict=True):
            with torch.no_grad():
                for parameter, value in zip(self._parameters, state, strict=True):
                    parameter.copy_(value)
            yield Draw(target.encode([prompt.text]), [prompt.seed], [prompt.text], cost=float(steps))

    def texts(self, concept: Any, prompts: Any) -> list[str]:
        """The prompts that are trained on."""
        return list(concept.prompts())
