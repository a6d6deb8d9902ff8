"""The four tasks of the mini world. Their prompts come from the vocabulary, in three disjoint splits."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, get_args

from erasekit.concepts import Concept, Kind
from erasekit.errors import unknown
from erasekit.evaluation.metrics import Rows, measured
from erasekit.evaluation.results import Metric
from erasekit.evaluation.tasks import Prompt, Split, Task, seed_offset
from erasekit_mini import vocabulary as words
from erasekit_mini.vocabulary import Row

PER_CONCEPT = 1_000  # more than the prompts that one concept has in a set


class MiniTask(Task):
    """A task of the mini world. Subclasses say which names there are and how each is worded.

    Attributes:
        kind: of its concepts.
        sizes: prompts per split: of each erased concept, of each preserved one, of all clean, pair and caption prompts.
    """

    domain = "mini"
    evaluators = ("mini-classifier", "mini-clip", "mini-frechet")
    control = "control"
    kind: ClassVar[Kind]
    sizes: ClassVar[Mapping[Split, Mapping[str, int]]] = {
        "train": {"erase": 60, "synonyms": 60, "preserve": 30, "clean": 200, "pairs": 60, "captions": 1000},
        "validation": {"erase": 30, "synonyms": 30, "preserve": 10, "clean": 60, "pairs": 30},
        "evaluation": {"erase": 50, "synonyms": 50, "preserve": 20, "clean": 100, "pairs": 50},
    }

    def erase_rows(self, name: str, split: Split, n: int) -> list[Row]:
        """`n` prompts that ask for a concept by its name."""
        raise NotImplementedError

    def synonym_rows(self, name: str, split: Split, n: int) -> list[Row]:
        """`n` prompts that ask for it in other words; none if it has no others."""
        return []

    def preserve_rows(self, erased: Sequence[str], split: Split, n: int) -> list[list[Row]]:
        """`n` prompts for each thing that has to stay."""
        return [self.erase_rows(name, split, n) for name in self.concepts if name not in erased]

    def pair_rows(self, erased: Sequence[str], split: Split, n: int) -> list[Row]:
        """`n` prompts that ask for two erased concepts at once, labelled `first+second`; none if there are no such prompts."""
        return []

    def words_of(self, name: str) -> tuple[str, ...]:
        """All words for a concept: no clean prompt and no caption may hold one."""
        return (name,)

    def complete(self, name: str, phrases: tuple[str, ...]) -> Concept:
        """A concept of this task with further phrases by the user."""
        raise NotImplementedError

    def concept(self, text: str) -> Concept:
        """Complete `cat` or `cat:kitty,kitten` to a concept of this task.

        Raises:
            UsageError: the task does not know the name.
        """
        parsed = Concept.parse(text)
        known = {name.lower(): name for name in self.concepts}
        if parsed.name.lower() not in known:
            raise unknown("concept", parsed.name, self.concepts, "erasekit ls tasks")
        return self.complete(known[parsed.name.lower()], parsed.phrases[1:])

    def prompts(self, which: str, concepts: Sequence[Concept], split: Split, limit: int | None = None) -> list[Prompt]:
        """One prompt set of one split. A set of single concepts takes turns between them, so that its start holds all.

        `limit` is the most per erased concept, and in sets that ask for none of them the most in all.
        """
        seed_offset(which)  # a set that there is not is refused
        n = self.sizes[split].get(which, 0)
        erased = [c.name for c in concepts]
        if which == "erase":
            rows = [self.erase_rows(name, split, n)[:limit] for name in erased]
            prompts = self._of_each(which, split, erased, rows, concepts)
        elif which == "synonyms":
            rows = [self.synonym_rows(name, split, n)[:limit] for name in erased]
            prompts = self._of_each(which, split, erased, rows, concepts)
        elif which == "preserve":
            kept = self.preserve_rows(erased, split, n)
            prompts = self._of_each(which, split, [rows[0].label for rows in kept], kept)[:limit]
        elif which == "pairs":
            prompts = self._numbered(which, split, enumerate(self.pair_rows(erased, split, n)))[:limit]
        elif which == "clean":
            clean = self._without(erased, enumerate(words.clean_prompts(split, 10_000)))
            prompts = self._numbered(which, split, clean)[:n][:limit]
        else:
            captions = self._without(erased, enumerate(self._captions() if split == "train" else []))
            prompts = self._numbered(which, split, captions)[:n][:limit]
        return prompts

    def _of_each(
        self, which: str, split: Split, names: Sequence[str], rows: Sequence[Sequence[Row]], concepts: Sequence[Concept] = ()
    ) -> list[Prompt]:
        """Prompts of several names in turns; the seed of each depends on its name and number alone."""
        neutral = {c.name: c.neutral for c in concepts}
        everything = list(dict.fromkeys((*self.concepts, *words.OBJECTS, *words.IDENTITIES)))
        turns: list[tuple[int, Prompt]] = []
        for name, of_name in zip(names, rows, strict=True):
            first = seed_offset(which) + PER_CONCEPT * everything.index(name)
            concept = "" if which == "preserve" else name
            for k, row in enumerate(of_name):
                seed = words.seed_of(split, first + k)
                without = " ".join(row.without.format(neutral.get(name, "")).split())
                turns.append((k, Prompt(row.prompt, seed, row.label, which, concept, "" if split == "evaluation" else without)))
        return [prompt for _, prompt in sorted(turns, key=lambda turn: turn[0])]

    def _numbered(self, which: str, split: Split, rows: Iterable[tuple[int, Row]]) -> list[Prompt]:
        """Prompts of rows that know their number in the whole set, which gives the seed."""
        prompts = []
        for k, row in rows:
            concept = row.label if which == "pairs" else ""
            prompts.append(Prompt(row.prompt, words.seed_of(split, seed_offset(which) + k), row.label, which, concept))
        return prompts

    def _without(self, erased: Sequence[str], rows: Iterable[tuple[int, Row]]) -> list[tuple[int, Row]]:
        """The numbered rows that say no word of an erased concept."""
        said = "|".join(re.escape(w) for name in erased for w in self.words_of(name))
        pattern = re.compile(rf"\b(?:{said})\b", re.IGNORECASE)
        return [(k, row) for k, row in rows if not (erased and pattern.search(row.prompt))]

    def _captions(self) -> list[Row]:
        """Captions of the whole world in training wordings, in random order."""
        rows = words.clean_prompts("train", 10_000)
        for name in words.OBJECTS:
            rows += words.object_prompts(name, "train", 40) + words.synonym_prompts(name, "train", 40)
        for who in words.IDENTITIES:
            rows += words.identity_prompts(who, "train", 40)
        rows += [Row(p, o) for artist in words.STYLES for p, _, o in words.style_prompts(artist, "train", 60)]
        rows += [Row(p, f"{a}+{b}") for p, a, b in words.pair_prompts("train", 300)]
        rows += [r for kind in ("explicit", "implicit", "adjective") for r in words.hazard_prompts(kind, "train", 100)]
        distinct = list({row.prompt: row for row in rows}.values())
        random.Random("captions").shuffle(distinct)
        return distinct


class Objects(MiniTask):
    """Ten classes of objects, with synonyms and plurals."""

    name = "objects"
    title = "Objects of the mini world"
    metrics = ("acc_e", "acc_s", "acc_g", "h_o", "acc_pairs")
    version = 2
    kind = "object"
    concepts = tuple(words.OBJECTS)

    def erase_rows(self, name: str, split: Split, n: int) -> list[Row]:
        """Prompts that name the class."""
        return words.object_prompts(name, split, n)

    def synonym_rows(self, name: str, split: Split, n: int) -> list[Row]:
        """Prompts with synonyms and plurals."""
        return words.synonym_prompts(name, split, n)

    def pair_rows(self, erased: Sequence[str], split: Split, n: int) -> list[Row]:
        """Two erased objects together."""
        if len(erased) < 2:
            return []
        return [Row(p, f"{a}+{b}") for p, a, b in words.pair_prompts(split, n, tuple(erased))]

    def words_of(self, name: str) -> tuple[str, ...]:
        """Its names and their plurals."""
        return tuple(form for word in words.OBJECTS[name] for form in (word, words.plural(word)))

    def complete(self, name: str, phrases: tuple[str, ...]) -> Concept:
        """Erased towards an empty background, which the world has words for; the other classes kept."""
        said = (p if p.split()[0] in ("a", "an", "the", "two") else words.article(p) for p in phrases)
        return Concept(
            name=name,
            kind=self.kind,
            phrases=(words.article(name), *said),
            neutral="a background",
            templates=words.FRAMES["train"],
            preserve=tuple(words.article(o) for o in self.concepts if o != name),
        )


class Celebrities(MiniTask):
    """Ten invented people; their faces go, faces stay."""

    name = "celebrities"
    title = "Celebrities of the mini world (invented people)"
    metrics = ("acc_e", "acc_s", "h_c", "face_rate")
    kind = "identity"
    concepts = words.IDENTITIES

    def erase_rows(self, name: str, split: Split, n: int) -> list[Row]:
        """Prompts that name the person."""
        return words.identity_prompts(name, split, n)

    def complete(self, name: str, phrases: tuple[str, ...]) -> Concept:
        """Erased towards a nameless person."""
        return Concept(
            name=name,
            kind=self.kind,
            phrases=(name, *phrases),
            neutral="a person",
            templates=words.PORTRAIT_FRAMES["train"],
            preserve=("a person", *(who for who in self.concepts if who != name)),
        )


class Styles(MiniTask):
    """Six invented artists, each a manner of drawing."""

    name = "styles"
    title = "Styles of the mini world (invented artists)"
    metrics = ("acc_e", "acc_s", "h_s", "style_removed")
    kind = "style"
    concepts = tuple(words.STYLES)

    def erase_rows(self, name: str, split: Split, n: int) -> list[Row]:
        """Objects in the style of the artist."""
        return [Row(prompt, artist) for prompt, artist, _ in words.style_prompts(name, split, n)]

    def complete(self, name: str, phrases: tuple[str, ...]) -> Concept:
        """Erased towards the same object by no artist in particular."""
        templates = tuple(f.format(words.article(o), "{}") for f in words.STYLE_FRAMES["train"] for o in words.OBJECTS)
        others = tuple(artist for artist in self.concepts if artist != name)
        return Concept(
            name=name, kind=self.kind, phrases=(name, *phrases), neutral="an artist", templates=templates, preserve=others
        )


class Hazards(MiniTask):
    """Hazards in place of explicit content: named outright, evoked, or attached to an object by an adjective."""

    name = "i2p"
    title = "I2P of the mini world: a stand-in, hazards (knife, bomb, gun) take the place of explicit content"
    metrics = ("unsafe_images", "unsafe_detections", "acc_s", "h_n")
    kind = "nsfw"
    version = 2
    concepts = ("hazard",)
    blurred = True
    sizes: ClassVar[Mapping[Split, Mapping[str, int]]] = {
        **MiniTask.sizes,
        "evaluation": {**MiniTask.sizes["evaluation"], "erase": 150},  # fifty of each kind
    }

    def erase_rows(self, name: str, split: Split, n: int) -> list[Row]:
        """Prompts that name a weapon, and prompts that only evoke one, in turns; evaluation evokes by words of its own."""
        kinds: list[list[Row]] = [words.hazard_prompts(kind, split, n) for kind in get_args(words.HazardKind)]
        return [row for turn in zip(*kinds, strict=False) for row in turn][:n]

    def preserve_rows(self, erased: Sequence[str], split: Split, n: int) -> list[list[Row]]:
        """The objects of the world."""
        return [words.object_prompts(o, split, n) for o in words.OBJECTS]

    def words_of(self, name: str) -> tuple[str, ...]:
        """Weapons, and what evokes them."""
        named = [form for h in words.HAZARDS for form in (h, words.plural(h))]
        return (*named, "weapon", "weapons", *words.HAZARD_IMPLICIT, *words.HAZARD_ADJECTIVES)

    def complete(self, name: str, phrases: tuple[str, ...]) -> Concept:
        """Erased by the weapons' names, and by half of what evokes them; towards an empty background, as objects are.

        The empty prompt would not do: a fifth of the training images hold a hazard, so the model draws one unasked.
        """
        named = tuple(words.article(h) for h in words.HAZARDS)
        preserve = tuple(words.article(o) for o in words.OBJECTS)
        return Concept(
            name=name,
            kind=self.kind,
            phrases=("a weapon", *named, *phrases),
            neutral="a background",
            templates=words.FRAMES["train"],
            preserve=preserve,
        )

    def aggregate(self, rows: Rows, concepts: Sequence[Concept]) -> dict[str, Metric]:
        """The metrics, and `unsafe_images` by how the prompts ask for a hazard, too."""
        found, erased = super().aggregate(rows, concepts), [c.name for c in concepts]
        kinds = get_args(words.HazardKind)
        asked = {kind: measured(["unsafe_images"], _of_kind(rows, kind), erased)["unsafe_images"] for kind in kinds}
        return found | {f"unsafe_images[{kind}]": metric for kind, metric in asked.items()}


def _of_kind(rows: Rows, kind: str) -> Rows:
    """The rows of hazard prompts of one kind."""
    return {
        side: [r for r in of if r["set"] == "erase" and words.hazard_kind(r["prompt"]) == kind] for side, of in rows.items()
    }
