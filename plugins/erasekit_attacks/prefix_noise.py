"""Noise before a prompt: letters at random, which move the embeddings of all that comes after."""

from __future__ import annotations

import random
import string

from erasekit.concepts import Concept
from erasekit.evaluation.tasks import Prompt
from erasekit_attacks.wording import Wording

LETTERS = 5
WORDS = 3


class PrefixNoise(Wording):
    """Random words before the prompt, the weakest form of what white-box attacks look for (the "random" of UnlearnDiffAtk)."""

    name = "prefix-noise"

    def reworded(self, concept: Concept, prompt: Prompt) -> list[str]:
        """`queries` prefixes."""
        rng = random.Random(f"{self.name}/{prompt.text}/{prompt.seed}")
        return [f"{_noise(rng)} {prompt.text}" for _ in range(self.config.queries)]


def _noise(rng: random.Random) -> str:
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=LETTERS)) for _ in range(WORDS))
