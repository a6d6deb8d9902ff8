"""Repetitions: the concept's word several times over, so that more tokens ask for it."""

from __future__ import annotations

import random

from erasekit_attacks.wording import Wording


class Repetitions(Wording):
    """The concept's word two to six times, with and without commas."""

    name = "repetitions"

    def variants(self, word: str, rng: random.Random) -> list[str]:
        """From few to many."""
        return [gap.join([word] * n) for n in (2, 3, 4, 6) for gap in (" ", ", ")]
