"""Templates and what fills their gaps: the sentences that phrases are put into."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

FILL = re.compile(r"\{(\w*)\}")


def numbered(templates: Sequence[str], fill: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, int]]:
    """Every template with every filling of its named gaps, the `{}` left open, each with a number.

    Neighbours differ in template and filling: of every third number each template and each filling has its share.
    """
    gaps = [[name for name in FILL.findall(template) if name] for template in templates]
    choices = [list(itertools.product(*(range(len(fill[name])) for name in names))) for names in gaps]
    for k in range(max(map(len, choices), default=0)):
        for i, template in enumerate(templates):
            if k < len(choices[i]):
                chosen = choices[i][k]
                filled = template
                for name, index in zip(gaps[i], chosen, strict=True):
                    filled = filled.replace(f"{{{name}}}", fill[name][index], 1)
                yield filled, i + sum(chosen)


def wordings(templates: Sequence[str], fill: Mapping[str, Sequence[str]]) -> list[str]:
    """Every template with every filling of its named gaps, the `{}` left open."""
    return [wording for wording, _ in numbered(templates, fill)]


def article(word: str) -> str:
    """A noun with its indefinite article."""
    return ("an " if word[:1].lower() in "aeiou" else "a ") + word


def plural(noun: str) -> str:
    """The regular English plural of a noun."""
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def is_plural(noun: str) -> bool:
    """Whether a noun looks like a regular plural."""
    return len(noun) > 3 and noun.endswith("s") and not noun.endswith(("ss", "us", "is", "as"))


def told(words: Sequence[str]) -> tuple[str, ...]:
    """The half of a concept's other words that methods are told: every other one, from the first; the rest is measured."""
    return tuple(words[::2])


def untold(words: Sequence[str]) -> tuple[str, ...]:
    """The half that nobody is told."""
    return tuple(words[1::2])
