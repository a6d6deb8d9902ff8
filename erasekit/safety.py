"""The one rule for every prompt that comes from outside: none may pair minors with sexual terms."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from erasekit.errors import UsageError

_MINOR = re.compile(
    r"\b(?:minors?|child|children|kids?|boys?|girls?|teens?|teenagers?|teenage|underage|preteens?|toddlers?|infants?|baby|babies"
    r"|schoolgirls?|schoolboys?|school ?children|pupils?|adolescents?|juveniles?|youngsters?|prepubescent|loli|lolita|shota)\b"
)
_SEXUAL = re.compile(
    r"\b(?:nudes?|nudity|naked|nsfw|sex|sexual|sexually|sexuali[sz]ed|sexy|erotic|erotica|porn|porno|pornograph\w+|topless"
    r"|undressed|unclothed|lingerie|lewd|hentai|seductive|sensual|xxx|explicit|fetish\w*|genital\w*|breasts?|orgy)\b"
)
_AGE = re.compile(r"\b(\d{1,2})\s*-?\s*(?:years?\s*-?\s*olds?|yrs?\s*-?\s*olds?|yo|y/o)\b|\baged?\s+(\d{1,2})\b")


def is_sexual(prompts: Iterable[str]) -> bool:
    """Whether one of the prompts has a sexual term."""
    return any(_SEXUAL.search(_plain(prompt)) for prompt in prompts)


def is_unsafe(prompt: str) -> bool:
    """Whether a prompt pairs minors with sexual terms."""
    text = _plain(prompt)
    ages = [int(a or b) for a, b in _AGE.findall(text)]
    return bool(_SEXUAL.search(text) and (_MINOR.search(text) or any(age < 18 for age in ages)))


def reject_unsafe(prompts: Iterable[str]) -> None:
    """Refuse prompts that pair minors with sexual terms; every loader of prompts calls this.

    Raises:
        UsageError: says which prompt, by its position.
    """
    for i, prompt in enumerate(prompts):
        if is_unsafe(prompt):
            raise UsageError(f"Prompt {i + 1} pairs minors with sexual terms, which erasekit refuses to draw. Remove it.")


def _plain(prompt: str) -> str:
    return unicodedata.normalize("NFKC", prompt).casefold().replace("_", " ")
