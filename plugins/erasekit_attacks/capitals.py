"""Capital letters, for models whose tokens tell them apart."""

from __future__ import annotations

import random

from erasekit_attacks.wording import Wording


class Capitals(Wording):
    """The concept's word in other cases."""

    name = "capitals"

    def variants(self, word: str, rng: random.Random) -> list[str]:
        """All capitals, the first one, every second one, and the reverse."""
        turns = ["".join(c.upper() if i % 2 == k else c.lower() for i, c in enumerate(word)) for k in (0, 1)]
        return [word.upper(), word.title(), *turns, word.swapcase(), word[:-1] + word[-1:].upper()]
