"""The task for any concept, in the user's own words: images side by side, and nothing yet that judges them."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from erasekit.concepts import Concept
from erasekit.evaluation.tasks import SPLITS, Prompt, Protocol, Split, Task, seed_offset

MANNERS = ("{}", "a photo of {}", "a close-up of {}", "a painting of {}", "a drawing of {}")
PLACES = (
    *("in a garden", "on a beach", "in a city street", "at night", "in the snow", "under a clear sky"),
    *("in a bright room", "by a river", "in front of a wall", "at sunset", "in the mountains"),
)
THINGS = (
    *("a man", "a woman", "an old couple", "a crowd", "a bicycle", "a bus", "a sailing boat", "a bridge"),
    *("a castle", "a house", "a lamp", "a chair", "a guitar", "a clock", "a pile of books", "a cup of coffee"),
    *("a bowl of fruit", "a loaf of bread", "a tree", "a field of flowers", "a waterfall", "a rabbit", "an elephant"),
)
CAPTIONS = 300
ARTICLES = {"a", "an", "the", "of"}


def frames(split: Split) -> list[str]:
    """Every third manner and place; each split has all of both, but no pair that another one has."""
    pairs = itertools.product(enumerate(MANNERS), enumerate(PLACES))
    return [f"{manner} {place}" for (i, manner), (k, place) in pairs if (i + k) % 3 == SPLITS.index(split)]


class Free(Task):
    """Any concept. Its words give way to "something", or to what its kind says; everyday things stay.

    Things that share a word with the concept are not preserved. Things of its kind, which an erasure harms first, are for the
    user to name (`--preserve`): no list of ours could know them.
    """

    name = "free"
    domain: ClassVar[Literal["natural"]] = "natural"
    title = "A concept in the user's own words"
    protocol = Protocol(sampler="ddim", steps=50, guidance=7.5, size=512, batch=4)

    def concept(self, text: str) -> Concept:
        """`a dog` or `a dog:a puppy,a hound`, as it is written."""
        return Concept.parse(text).of_kind("free")

    def prompts(self, which: str, concepts: Sequence[Concept], split: Split, limit: int | None = None) -> list[Prompt]:
        """One prompt set of one split. Phrases of a concept take turns; there are no synonyms that were not given."""
        first = 1_000_000 * SPLITS.index(split) + seed_offset(which)
        chosen, kept = frames(split), _kept(concepts)
        two = (f"{a} and {b}" for a, b in itertools.permutations(kept, 2))
        if which == "erase":
            found = [
                (_asked(f, c, c.phrases[i % len(c.phrases)]), c.name) for i, f in enumerate(chosen[:limit]) for c in concepts
            ]
        elif which == "pairs":
            both = [(a, b) for a, b in itertools.combinations(concepts, 2)]
            found = [(f.format(f"{a.phrases[0]} and {b.phrases[0]}"), f"{a.name}+{b.name}") for f in chosen for a, b in both]
        elif which == "preserve":
            named = [phrase for c in concepts for phrase in c.preserve]
            found = [(f.format(thing), "") for f, thing in zip(itertools.cycle(chosen), [*named, *kept], strict=False)]
            found = [(thing, "") for thing in kept if split == "train"] + found
        elif which == "clean":
            found = [(f.format(things), "") for f, things in zip(chosen, _shuffled(two), strict=False)]
        elif which == "captions" and split == "train":
            found = [(f.format(thing), "") for f, thing in _shuffled(itertools.product(chosen, [*kept, *two]))[:CAPTIONS]]
        else:
            found = []
        prompts = [Prompt(text, first + i, concept, which, concept) for i, (text, concept) in enumerate(found)]
        return prompts if which == "erase" else prompts[:limit]


def _asked(frame: str, concept: Concept, phrase: str) -> str:
    """A frame with a concept in it; of a style, with a thing in that style."""
    if concept.kind != "style":
        return frame.format(phrase)
    thing = THINGS[sum(map(ord, frame)) % len(THINGS)]
    return f"{frame.format(thing)} in the style of {phrase}"


def _kept(concepts: Sequence[Concept]) -> list[str]:
    """The things of which no word is said by the concepts."""
    said = {word for c in concepts for phrase in c.phrases for word in re.findall(r"\w+", phrase.lower())} - ARTICLES
    return [thing for thing in THINGS if said.isdisjoint(thing.split())]


def _shuffled(items: Any) -> list[Any]:
    """All of them in random order, the same one every time."""
    found = list(items)
    random.Random("free").shuffle(found)
    return found
