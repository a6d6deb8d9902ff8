"""Misspellings: letters of the concept's word are doubled, dropped, swapped or exchanged."""

from __future__ import annotations

import random

from erasekit_attacks.wording import Wording

VOWELS = "aeiou"


class Misspellings(Wording):
    """One slip of the pen for each image."""

    name = "misspellings"

    def variants(self, word: str, rng: random.Random) -> list[str]:
        """Every slip once, in random order."""
        found = []
        for i, letter in enumerate(word):
            if letter.isalpha():
                before, after = word[:i], word[i + 1 :]
                found += [before + letter * 2 + after, before + after]
                found += [before + after[:1] + letter + after[1:]] if after[:1].isalpha() else []
                found += [before + other + after for other in VOWELS if letter in VOWELS and other != letter]
        rng.shuffle(found)
        return found
