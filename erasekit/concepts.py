"""What is to be erased: a concept, its phrases, and the neutral words that take its place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from erasekit.documents import fault_of
from erasekit.errors import UsageError
from erasekit.texts import Line, one_line

Kind = Literal["object", "identity", "style", "nsfw", "free"]
EMPTY_PROMPT = "<empty>"  # as a neutral word: the whole prompt becomes the empty one
# What takes the place of a concept of each kind where nobody says it: what the kind is, but nobody's and nothing in particular.
NEUTRAL: dict[Kind, str] = {
    "object": "an object",
    "identity": "a person",
    "style": "an artist",
    "nsfw": "a person wearing clothes",
    "free": "something",
}
TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "object": ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}"),
    "identity": ("{}", "a portrait of {}", "a photo of {}", "a picture of {}", "{} smiling", "a close-up of {}"),
    "style": ("a painting by {}", "a painting in the style of {}", "a drawing by {}", "a landscape by {}", "a portrait by {}"),
    "nsfw": ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a painting of {}"),
    "free": ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}"),
}


def _template(text: str) -> str:
    if text.count("{}") != 1 or re.search(r"[{}]", text.replace("{}", "")):
        raise ValueError("a template has one '{}' and no other braces")
    return text


class Concept(BaseModel):
    """One concept.

    Attributes:
        name: what the concept is called in files and tables.
        kind: decides defaults; `free` where nothing is known.
        phrases: the wordings by which it is erased, with their article ("a cat"); the first one is its own name.
        neutral: the words that take the place of its own in a prompt; "" drops them, and `EMPTY_PROMPT` makes the whole prompt
            the empty one, which guidance is measured from. The empty prompt is no absence: a model that often drew the concept
            in training draws it unasked too.
        templates: sentences with one `{}` that the phrases are put into.
        preserve: phrases of what must not change with it: things of its kind, which are what an erasure harms first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(one_line)]
    kind: Kind = "free"
    phrases: tuple[Line, ...] = Field(min_length=1)
    neutral: Line = ""
    templates: tuple[Annotated[Line, AfterValidator(_template)], ...] = Field(TEMPLATES["free"], min_length=1)
    preserve: tuple[Line, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Concept:
        """Read `name` or `name:phrase,phrase`.

        Raises:
            UsageError: the name is empty, or some text is not a line that can be seen.
        """
        name, _, rest = unicodedata.normalize("NFC", text).partition(":")  # an accent may come as a character of its own
        name = " ".join(name.split())
        if not name:
            raise UsageError(f"A concept needs a name, given '{text}'. Write 'cat' or 'cat:kitty,kitten'.")
        phrases = dict.fromkeys([name, *(p for p in (" ".join(r.split()) for r in rest.split(",")) if p)])
        try:
            return cls(name=name, phrases=tuple(phrases))
        except ValidationError as error:
            raise UsageError(f"Cannot take the concept '{text:.80}': {fault_of(error)}.") from None

    def of_kind(self, kind: Kind) -> Concept:
        """The concept as one of a kind, with that kind's neutral words and templates."""
        return self.model_copy(update={"kind": kind, "neutral": NEUTRAL[kind], "templates": TEMPLATES[kind]})

    def prompts(self, templates: tuple[str, ...] | None = None) -> list[str]:
        """Every phrase in every template (`self.templates` if none are given)."""
        return [t.format(p) for p in self.phrases for t in templates or self.templates]

    def find(self, prompt: str) -> str:
        """The phrase that stands in `prompt` as whole words, the longest one; "" if none does."""
        longest = sorted(self.phrases, key=len, reverse=True)
        return next((phrase for phrase in longest if whole_words(phrase).search(prompt)), "")

    def replaced(self, prompt: str) -> str:
        """`prompt` with every phrase replaced by the neutral words, as it is if none stands in it."""
        for phrase in sorted(self.phrases, key=len, reverse=True):  # the longest first: "a cat" is in "a cat face"
            prompt = whole_words(phrase).sub(lambda found: self.neutral, prompt)
        return prompt if self.neutral else " ".join(prompt.split())

    def neutralise(self, prompt: str) -> str:
        """What takes the place of a prompt that asks for the concept, in its own words or in others.

        Its phrases are replaced; a prompt that holds none of them, and so only evokes the concept, becomes the neutral words.
        """
        if self.neutral == EMPTY_PROMPT:
            return ""
        return self.replaced(prompt) if self.find(prompt) else self.neutral


def contradictions(concepts: Sequence[Concept]) -> list[str]:
    """A line for each word that is to be erased and to stay, and for each that is to be erased twice."""
    lines, owners = [], dict[str, str]()
    for concept in concepts:
        own = {_bare(phrase) for phrase in concept.phrases}
        if _bare(concept.neutral) in own:
            line = f"The neutral words of '{concept.name}' are '{concept.neutral}', which is what is erased"
            lines.append(f"{line}. Say what takes its place: --neutral WORDS.")
        kept = [phrase for phrase in concept.preserve if _bare(phrase) in own]
        lines += [f"'{phrase}' is to be erased, as '{concept.name}', and to stay. Choose one of them." for phrase in kept]
        for phrase in sorted(own):
            if (other := owners.setdefault(phrase, concept.name)) != concept.name:
                lines.append(f"'{phrase}' stands for both '{other}' and '{concept.name}'. Erase it as one of them.")
    return lines


def _bare(phrase: str) -> str:
    """A phrase as it is compared."""
    return without_article(phrase.casefold())


def without_article(phrase: str) -> str:
    """A phrase without its article: "cat" of "a cat"."""
    return re.sub(r"^(an?|the) ", "", " ".join(phrase.split()), flags=re.IGNORECASE)


def whole_words(phrase: str) -> re.Pattern[str]:
    """What finds a phrase in a prompt, but not in the midst of a word."""
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)")
