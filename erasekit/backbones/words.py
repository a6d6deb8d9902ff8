"""Which tokens of a tokenizer are words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def fragments(tokens: Iterable[str]) -> set[str]:
    """Tokens of a byte-pair vocabulary that end a word, but are no words: over four times as many end in them as begin."""
    bare = {token.removesuffix("</w>") for token in tokens}
    words = {token.removesuffix("</w>") for token in tokens if token.endswith("</w>")}
    ends = Counter(word[k:] for word in words for k in range(1, len(word) - 2))
    begins = Counter(token[:k] for token in bare for k in range(3, len(token)))
    return {word for word in words if ends[word] > 4 * (1 + begins[word])}
