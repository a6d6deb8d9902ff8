"""Text from outside: what may stand in it, and how it is shown."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, Field

JOINERS = "\u200c\u200d"  # Persian and emoji are written with them; other invisible characters have no place in a name


def one_line(text: str) -> str:
    """The text, if it is one line of characters that can be seen.

    Raises:
        ValueError: it is not; says which character is in the way.
    """
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS:
            raise ValueError(f"it holds the invisible character U+{ord(character):04X}")
    return text


def shown(text: str) -> str:
    """The text for a terminal: line breaks stay, what would steer the terminal or hide something is spelled out."""
    return "".join(c if c in "\n\t" or _harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _harmless(character: str) -> bool:
    return character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


Lines = Annotated[str, Field(max_length=100_000), AfterValidator(one_line)]  # several that were put into one
Line = Annotated[str, Field(max_length=2000), AfterValidator(one_line)]
