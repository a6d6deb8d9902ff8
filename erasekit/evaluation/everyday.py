"""Everyday things in everyday frames: what natural images are asked for where a task names nothing better."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from erasekit.concepts import Concept
from erasekit.evaluation.tasks import SPLITS, Split

Item = TypeVar("Item")

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
ARTICLES = {"a", "an", "the", "of"}


def frames(split: Split) -> list[str]:
    """Every third manner and place; each split has all of both, but no pair that another one has."""
    pairs = itertools.product(enumerate(MANNERS), enumerate(PLACES))
    return [f"{manner} {place}" for (i, manner), (k, place) in pairs if (i + k) % 3 == SPLITS.index(split)]


def kept_things(concepts: Sequence[Concept]) -> list[str]:
    """The things of which no word is said by the concepts."""
    said = {word for c in concepts for phrase in c.phrases for word in re.findall(r"\w+", phrase.lower())} - ARTICLES
    return [thing for thing in THINGS if said.isdisjoint(thing.split())]


def shuffled(items: Iterable[Item]) -> list[Item]:
    """All of them in random order, the same one every time."""
    found = list(items)
    random.Random("free").shuffle(found)
    return found
