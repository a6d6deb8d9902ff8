"""Which pairs of images a page shows, in which order, and what became of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from erasekit.evaluation.tasks import PROMPT_SETS

MOST_IMAGES = 500
MOST_NAMES = 6
T = TypeVar("T")


class Outcome(NamedTuple):
    """What became of a pair.

    Attributes:
        key: names it in the page.
        title: names it to a reader.
        good: whether it is what an erasure is for; None where it says nothing about it.
    """

    key: str
    title: str
    good: bool | None


STILL = Outcome("still", "still there", False)
LOST = Outcome("lost", "lost", False)
FAILED = Outcome("unscored", "not scored", None)
GONE = Outcome("gone", "gone", True)
KEPT = Outcome("kept", "kept", True)
NEVER = Outcome("never", "not in the base's either", None)
UNJUDGED = Outcome("unjudged", "nothing judged it", None)
OUTCOMES = (STILL, LOST, FAILED, GONE, KEPT, NEVER, UNJUDGED)  # in the order in which they are shown


class Pair(NamedTuple):
    """One prompt and its two images, as rows of the scores."""

    base: Mapping[str, Any]
    erased: Mapping[str, Any]

    @property
    def outcome(self) -> Outcome:
        """What became of it, by the evaluator that says whether an image shows what its prompt asks for (`shown`)."""
        if self.base["failed"] or self.erased["failed"]:
            return FAILED
        before, after = self.base.get("shown"), self.erased.get("shown")
        if after is None:
            return UNJUDGED
        if self.base["concept"]:  # the prompt asks for what was erased
            return STILL if after else GONE if before else NEVER
        return KEPT if after else LOST if before else NEVER


def pairs_of(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """The pairs of both sides, in the order of the prompts."""
    sides: dict[str, dict[int, Mapping[str, Any]]] = {"base": {}, "erased": {}}
    for row in rows:
        sides[row["side"]][row["index"]] = row
    return [Pair(row, sides["erased"][index]) for index, row in sides["base"].items() if index in sides["erased"]]


def by_set(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs by prompt set, sets in the order of `PROMPT_SETS`."""
    found: dict[str, list[Pair]] = {name: [] for name in PROMPT_SETS}
    for pair in pairs:
        found.setdefault(pair.base["set"], []).append(pair)
    return {name: own for name, own in found.items() if own}


def set_title(which: str) -> str:
    """What a prompt set asks for."""
    return PROMPT_SETS[which].meaning if which in PROMPT_SETS else which


def chosen(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most `most` pairs, failures first; prompt sets take turns, so that none crowds another out."""
    ranked = [sorted(own, key=lambda pair: OUTCOMES.index(pair.outcome)) for own in by_set(pairs).values()]
    return sorted(itertools.islice(in_turns(ranked), most), key=lambda pair: OUTCOMES.index(pair.outcome))


def in_turns(lists: Sequence[Sequence[T]]) -> Iterator[T]:
    """The first of each list, then the second of each, and so on."""
    for turn in itertools.zip_longest(*lists):
        yield from (item for item in turn if item is not None)


def verdict(row: Mapping[str, Any]) -> str:
    """What the evaluators say of one image."""
    if row["failed"]:
        return "not scored"
    if row.get("shown") is None:
        return ""
    score = row.get("score")
    return f"{'shows' if row['shown'] else 'no'} {row['label']}{'' if score is None else f' ({score:.2f})'}"


class Thing(NamedTuple):
    """How often images that ask for one thing show it, before and after."""

    label: str
    erased: bool
    base: float
    after: float
    n: int


def things(pairs: Sequence[Pair]) -> list[Thing]:
    """What became of each thing that was asked for: those that were erased first, then those that lost most."""
    found: dict[tuple[bool, str], list[tuple[bool, bool]]] = {}
    for pair in pairs:
        if pair.outcome not in (FAILED, UNJUDGED):
            key = bool(pair.base["concept"]), pair.base["label"]
            found.setdefault(key, []).append((bool(pair.base["shown"]), bool(pair.erased["shown"])))
    rows = []
    for (erased, label), seen in found.items():
        before, after = (sum(side) / len(seen) for side in zip(*seen, strict=True))
        rows.append(Thing(label, erased, before, after, len(seen)))
    return sorted(rows, key=lambda thing: (not thing.erased, thing.after - thing.base))


def names(concepts: Sequence[str]) -> str:
    """The concepts of a run, the first of them if they are many."""
    more = len(concepts) - MOST_NAMES
    return ", ".join(concepts) if more <= 1 else f"{', '.join(concepts[:MOST_NAMES])} and {more} more"


def lead(found: Sequence[Thing], concepts: Sequence[str]) -> list[str]:
    """A run in a sentence or two: whether what was erased is gone, and whether the rest stayed; none if nothing judged it."""
    sentences = []
    for gone in (True, False):
        own = [thing for thing in found if thing.erased is gone]
        n = sum(thing.n for thing in own)
        before, after = (round(sum(getattr(t, side) * t.n for t in own)) for side in ("base", "after"))
        if n and gone:
            sentences.append(
                f"Asked for {names(concepts)}, {after} of {n} images still show it; the unedited model's {before} of {n}."
            )
        elif n:
            sentences.append(f"Asked for other things, {after} of {n} show them; the unedited model's {before}.")
    return sentences
