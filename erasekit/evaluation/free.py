"""The task for any concept, in the user's own words: images side by side, and nothing yet that judges them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar, Literal

from erasekit.concepts import Concept
from erasekit.evaluation.everyday import THINGS, frames, kept_things, shuffled
from erasekit.evaluation.tasks import SPLITS, Prompt, Protocol, Split, Task, seed_offset

CAPTIONS = 300


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
        chosen, kept = frames(split), kept_things(concepts)
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
            found = [(f.format(things), "") for f, things in zip(chosen, shuffled(two), strict=False)]
        elif which == "captions" and split == "train":
            found = [(f.format(thing), "") for f, thing in shuffled(itertools.product(chosen, [*kept, *two]))[:CAPTIONS]]
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
