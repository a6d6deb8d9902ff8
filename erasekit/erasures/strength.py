"""How strongly an erasure acts: a factor on its deltas, for all of its parts or for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from erasekit.errors import UsageError, unknown

Strength = float | Mapping[str, float]  # 0 is the base, 1 the erasure as it is; of all concepts, or of each by name


def factors(strength: Strength | None, names: Sequence[str]) -> dict[str, float]:
    """The factor of each part of an erasure; what is not named is 1.

    Raises:
        UsageError: a name is not a part's, or a factor is no finite number.
    """
    given = strength if isinstance(strength, Mapping) else dict.fromkeys(names, 1.0 if strength is None else strength)
    for name, factor in given.items():
        if name not in names:
            raise unknown("concept of this erasure", name, names, "erasure.json")
        if not math.isfinite(factor):
            raise UsageError(
                f"A strength is a finite number, given {factor} for '{name}'. 0 is the base, 1 the erasure as it is."
            )
    return {name: float(given.get(name, 1.0)) for name in names}


def parse(texts: Sequence[str]) -> Strength | None:
    """Read `0.5` (of everything) or several `cat=0.5`; None if nothing is given.

    Raises:
        UsageError: it is neither.
    """
    if not texts:
        return None
    named: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        try:
            factor = float(value)
        except ValueError:
            raise UsageError(f"Cannot read the strength '{text}'. Write a number, or CONCEPT=NUMBER, e.g. cat=0.5.") from None
        if not math.isfinite(factor):
            raise UsageError(f"A strength is a finite number, given {text}. 0 is the base, 1 the erasure as it is.")
        if not equals:
            if len(texts) > 1:
                raise UsageError(f"The strength {text} is of all concepts: give it alone, or CONCEPT=NUMBER for each.")
            return factor
        named[name] = factor
    return named
