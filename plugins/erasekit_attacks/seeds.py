"""Seed search: the prompt as it is, with other noise."""

from __future__ import annotations

from collections.abc import Generator

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.evaluation.tasks import Prompt
from erasekit_attacks.wording import TOGETHER


class Seeds(Attack):
    """Says how often a concept comes through by chance; every other attack has as many tries."""

    name = "seeds"
    knows = "nothing"
    config: AttackConfig

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """Other seeds, one after the other."""
        seeds = [prompt.seed + 7_000_000 + i for i in range(self.config.queries)]
        for i in range(0, len(seeds), TOGETHER):
            some = seeds[i : i + TOGETHER]
            yield target.draw([prompt.text] * len(some), some)
