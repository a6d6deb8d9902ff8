"""What attacks by gradients on tokens share: points to be explained, and the loop from steps to images."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping

import torch
from pydantic import Field

from erasekit.attacks.attack import AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.attacks.tokens import Slots, read_hard, spelled
from erasekit.backbones.protocol import Conditioning
from erasekit.evaluation.tasks import Prompt


class SearchConfig(AttackConfig):
    """Settings of a search by gradients."""

    steps: int = Field(40, ge=1, description="steps before each image")
    restarts: int = Field(1, ge=1, description="beginnings anew, among which the images are shared out")
    points: int = Field(1, ge=1, description="points of progress in a step")
    lr: float = Field(0.01, gt=0, description="rate of the optimiser")
    weight_decay: float = Field(0.1, ge=0, description="its weight decay")
    encoders: tuple[str, ...] = Field((), description="text encoders whose tokens are looked for; none named: all")


def search(
    target: Target,
    prompt: Prompt,
    config: SearchConfig,
    slots: Mapping[str, Slots],
    like: Conditioning,
    begin: Callable[[torch.Generator], None],
    step: Callable[[torch.Generator], None],
    tokens: Callable[[], Mapping[str, torch.Tensor]],
) -> Generator[Draw]:
    """Take some steps, draw what the tokens are by then, and go on; `restarts` times from the beginning.

    Args:
        target: the model.
        prompt: gives the noise of the images.
        config: the budget.
        slots: where the tokens stand.
        like: the plain prompt, encoded.
        begin: draws the parameters at the beginning.
        step: takes one step.
        tokens: the tokens that the parameters stand for now.
    """
    generator, each = target.generator_of(prompt), -(-config.queries // config.restarts)
    for _ in range(config.restarts):
        begin(generator)
        for _ in range(each):
            for _ in range(config.steps):
                step(generator)
            found = tokens()
            yield Draw(read_hard(target, slots, found, like), [prompt.seed], [spelled(target, slots, found)])
