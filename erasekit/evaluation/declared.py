"""A task that a TOML file declares: prompts from templates, lists, CSV files and the hub, in three disjoint splits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from erasekit.concepts import EMPTY_PROMPT, NEUTRAL, Concept
from erasekit.errors import UsageError, unknown
from erasekit.evaluation.everyday import frames, kept_things, shuffled
from erasekit.evaluation.metrics import MEASURES
from erasekit.evaluation.metrics import split as plain_name
from erasekit.evaluation.promptfiles import PromptRows, from_csv, from_hub, read_rows
from erasekit.evaluation.taskfile import ConceptSpec, Content, SetSpec
from erasekit.evaluation.tasks import SPLITS, Prompt, Split, Task, seed_offset
from erasekit.evaluation.wordings import article, is_plural, plural, told, untold, wordings
from erasekit.safety import reject_unsafe

PER_THING = 1_000  # seeds between one concept or thing and the next
OWN_TEMPLATES = 10  # sentences that a method puts every phrase into
# How many prompts of each concept or thing (erase, synonyms, preserve), or in all.
SIZES: Mapping[Split, Mapping[str, int]] = {
    "train": {"erase": 60, "synonyms": 60, "preserve": 10, "clean": 60, "pairs": 60, "captions": 300},
    "validation": {"erase": 30, "synonyms": 30, "preserve": 4, "clean": 30, "pairs": 30},
    "evaluation": {"erase": 50, "synonyms": 50, "preserve": 20, "clean": 100, "pairs": 50},
}


class Declared(Task):
    """The task of a TOML file (see `taskfile.TaskFile` for its keys).

    Training and validation say templates of their own, other seeds, and of a concept's other words the half that evaluation
    does not. A prompt set that no metric rests on is not drawn, unless the file asks for it; clean prompts always are.
    """

    def __init__(self, path: Path, overrides: Mapping[str, Any] | None = None) -> None:
        """Read the file; `overrides` are keys that are otherwise.

        Raises:
            UsageError: lists every mistake, one a line.
        """
        self._content = Content(path, overrides or {})
        keys = self._content.keys
        self._keys = keys
        fixed: dict[str, Any] = {  # attributes of every task's class, of this object alone
            "name": keys.name,
            "domain": keys.domain,
            "version": keys.version,
            "title": keys.title,
            "blurred": keys.blurred,
            "concepts": tuple(keys.concepts),
            "evaluators": tuple(keys.evaluators),
            "evaluator_settings": keys.evaluators,
            "metrics": keys.metrics,
            "protocol": keys.protocol,
            "digest": self._content.digest,
        }
        self.__dict__.update(fixed)
        self._rows: dict[str, PromptRows] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """What images can be asked to show: the concepts' labels, and the things that stay."""
        return tuple(dict.fromkeys(map(self._label, self._things)))

    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers has to know of the prompts, one line each; of the sets that have been asked for."""
        lines = []
        for which, found in self._rows.items():
            if found.left_out:
                lines.append(f"{found.left_out} prompts of '{which}' pair minors with sexual terms and were left out.")
            if found.empty:
                lines.append(f"{found.empty} prompts of '{which}' are empty.")
            if found.repeated:
                lines.append(f"{found.repeated} rows of '{which}' repeat a prompt with its seed: its image counts again.")
            meant = self._keys.sets[which].sha256
            if meant and not found.sha256.startswith(meant):
                lines.append(f"The prompts of '{which}' are not the declared list ({found.sha256[:8]}, declared {meant[:8]}).")
        return tuple(lines)

    def describe(self) -> dict[str, Any]:
        """What the protocol says of the task: its profile, and the lists that its prompts came from."""
        lists = {which: {"sha256": f.sha256[:16], "n": len(f.rows), "left_out": f.left_out} for which, f in self._rows.items()}
        return ({"profile": self._keys.profile} if self._keys.profile else {}) | ({"lists": lists} if lists else {})

    def concept(self, text: str) -> Concept:
        """Complete `cat` or `cat:kitty,kitten` to a concept of the file.

        Raises:
            UsageError: the file does not name it, nor is it open to others.
        """
        parsed = Concept.parse(text)
        known = {name.casefold(): name for name in self._things}
        name = known.get(parsed.name.casefold(), parsed.name)
        if other := self._named(name):
            line = f"'{name}' is another word for '{other}' in the task '{self.name}'"
            raise UsageError(f"{line}. Erase that: --concept '{other}'.")
        if name not in self._keys.concepts and not self._keys.open:
            raise unknown("concept", parsed.name, self._keys.concepts, "erasekit ls tasks")
        spec, kind = self._spec(name), self._keys.kind
        neutral = next((n for n in (spec.neutral, self._keys.neutral) if n is not None), NEUTRAL[kind])
        return Concept(
            name=name,
            kind=kind,
            phrases=tuple(dict.fromkeys((*(spec.phrases or (self._said(name),)), *map(self._said, parsed.phrases[1:])))),
            neutral=neutral,
            templates=tuple(self._wordings("train")[:OWN_TEMPLATES]),
            preserve=(
                *spec.preserve,
                *(phrase for other in self._things if other != name for phrase in self._phrases(other)[:1]),
            ),
        )

    def packages(self) -> Mapping[str, str]:
        """What data sets of the hub are read with, if it has any."""
        return {"datasets": "erasekit[datasets]"} if any(spec.dataset for spec in self._keys.sets.values()) else {}

    def prompts(self, which: str, concepts: Sequence[Concept], split: Split, limit: int | None = None) -> list[Prompt]:
        """One prompt set of one split; sets of several concepts or things take turns between them.

        `limit` is the most per erased concept, and in sets that ask for none of them the most in all.

        Raises:
            UsageError: a prompt pairs minors with sexual terms, or the file of a set cannot be used.
            EnvironmentProblem: the data set of a set cannot be loaded.
        """
        seed_offset(which)  # a set that there is not is refused
        spec = self._keys.sets.get(which, SetSpec())
        if split == "evaluation" and (spec.prompts or spec.csv or spec.dataset):
            found = self._listed(which, spec, concepts, limit)
        else:
            n = SIZES[split].get(which, 0) if split != "evaluation" else self._size(which, spec)
            found = self._made(which, concepts, split, n, limit)
        reject_unsafe(p.text for p in found)
        return found

    # From templates

    def _made(self, which: str, concepts: Sequence[Concept], split: Split, n: int, limit: int | None) -> list[Prompt]:
        """`n` prompts (of each concept or thing) of a set, from templates."""
        erased = {c.name for c in concepts}
        first = 1_000_000 * SPLITS.index(split) + seed_offset(which)
        n = min(n, limit) if limit is not None and which in ("erase", "synonyms") else n
        if which == "erase":
            return _in_turns([self._of(c, self._phrases(c.name), which, split, n) for c in concepts])
        if which == "synonyms":
            return _in_turns([self._of(c, self._other_words(c, split), which, split, n) for c in concepts])
        if which == "preserve":
            kept = [name for name in self._things if name not in erased]
            sets = [self._stays(name, split, n) for name in kept]
            return [*_in_turns(sets), *self._everyday(concepts, split)][:limit]
        if which == "pairs":
            return _numbered(self._pairs(concepts, split, n), first)[:limit]
        if which == "clean":
            return _numbered(self._clean(concepts, split, n), first)[:limit]
        return _numbered(self._captions(concepts) if split == "train" else [], first)[:n][:limit]

    def _of(self, concept: Concept, phrases: Sequence[str], which: str, split: Split, n: int) -> list[Prompt]:
        """`n` prompts that ask for a concept by its phrases in turns; repeated with other seeds where wordings run out."""
        said = [(w, phrase) for w in self._wordings(split) for phrase in phrases]
        said = said if split == "evaluation" else said[:n]
        first = self._first(concept.name, which, split)
        label, prompts = self._label(concept.name), []
        for k in range(n if split == "evaluation" and said else len(said)):
            wording, phrase = said[k % len(said)]
            plain = "" if split == "evaluation" or concept.neutral == EMPTY_PROMPT else wording.format(concept.neutral)
            prompts.append(Prompt(wording.format(phrase), first + k, label, which, concept.name, " ".join(plain.split())))
        return prompts

    def _stays(self, name: str, split: Split, n: int) -> list[Prompt]:
        """`n` prompts for a thing that has to stay."""
        said, first = self._wordings(split), self._first(name, "preserve", split)
        asked = [(said[k % len(said)], first + k) for k in range(n if split == "evaluation" else min(n, len(said)))]
        return [Prompt(w.format(self._phrases(name)[0]), seed, self._label(name), "preserve") for w, seed in asked]

    def _everyday(self, concepts: Sequence[Concept], split: Split) -> list[Prompt]:
        """Everyday things that training and validation hold, too; numbers are of the task's own things."""
        if self.domain == "mini" or split == "evaluation":
            return []
        found = kept_things(concepts)
        framed = [frame.format(thing) for frame, thing in zip(itertools.cycle(frames(split)), found, strict=False)]
        texts = [*found, *framed] if split == "train" else framed
        return _numbered([(text, "", "preserve", "") for text in texts], self._first("", "preserve", split))

    def _pairs(self, concepts: Sequence[Concept], split: Split, n: int) -> list[tuple[str, str, str, str]]:
        both = list(itertools.combinations(concepts, 2))
        said = [(w, a, b) for w in self._wordings(split) for a, b in both][:n]
        names = [(w.format(f"{a.phrases[0]} and {b.phrases[0]}"), a, b) for w, a, b in said]
        return [(text, f"{self._label(a.name)}+{self._label(b.name)}", "pairs", f"{a.name}+{b.name}") for text, a, b in names]

    def _clean(self, concepts: Sequence[Concept], split: Split, n: int) -> list[tuple[str, str, str, str]]:
        """Pairs of everyday things; the mini world has none that this module knows of."""
        if self.domain == "mini":
            return []
        two = shuffled(f"{a} and {b}" for a, b in itertools.permutations(kept_things(concepts), 2))
        chosen = frames(split)
        return [(chosen[i % len(chosen)].format(two[i % len(two)]), "", "clean", "") for i in range(n)]

    def _captions(self, concepts: Sequence[Concept]) -> list[tuple[str, str, str, str]]:
        """What can be drawn besides the concepts: everyday things, and those of the task that stay."""
        erased = {c.name for c in concepts}
        own = [w.format(self._phrases(name)[0]) for name in self._things if name not in erased for w in self._wordings("train")]
        things = [] if self.domain == "mini" else kept_things(concepts)
        two = [f"{a} and {b}" for a, b in itertools.permutations(things, 2)]
        daily = [frame.format(thing) for frame in frames("train") for thing in (*things, *two)]
        half = SIZES["train"]["captions"] // 2
        return [(text, "", "captions", "") for text in shuffled([*shuffled(own)[:half], *shuffled(daily)[: 2 * half]])]

    # From lists and files

    def _listed(self, which: str, spec: SetSpec, concepts: Sequence[Concept], limit: int | None) -> list[Prompt]:
        """The evaluation prompts of a list, a file or a data set; each keeps its own seed, guidance and size."""
        rows = self._rows_of(which, spec).rows
        asks = which in ("erase", "synonyms", "pairs")
        names = [c.name for c in concepts]
        both = [f"{a}+{b}" for a, b in itertools.permutations(names, 2)] if which == "pairs" else []
        spoken = {name.lower(): name for name in (*names, *both)}
        if asks and len(names) > 1 and not all("concept" in row for row in rows):
            raise UsageError(
                f"The prompts of '{which}' do not say which concept they ask for. Erase one concept, or add a column 'concept'."
            )
        first, found = 1_000_000 * SPLITS.index("evaluation") + seed_offset(which), []
        for k, row in enumerate(rows):
            concept = (spoken.get(row["concept"].lower(), "") if "concept" in row else names[0]) if asks else ""
            if asks and not concept:
                continue
            label = row.get("label") or (self._label(concept) if asks else "")
            drawn = {key: row[key] for key in ("guidance", "width", "height") if key in row}
            found.append(Prompt(row["text"], row.get("seed", first + k), label, which, concept, **drawn))
        if rows and not found:
            others = ", ".join(dict.fromkeys(row["concept"] for row in rows[:20]))
            raise UsageError(f"No prompt of '{which}' asks for {' or '.join(names)}: its column 'concept' has {others}.")
        return _limited(found, limit, asks)

    def _rows_of(self, which: str, spec: SetSpec) -> PromptRows:
        if which not in self._rows:
            how: dict[str, Any] = {"where": spec.where, "sort": spec.sort, "n": spec.n}
            if spec.prompts:
                reject_unsafe(spec.prompts)
                found = read_rows([{"prompt": text} for text in spec.prompts], f"sets.{which}", n=spec.n)
            elif spec.csv:
                found = read_rows(from_csv(Path(spec.csv)), Path(spec.csv).name, **how)
            else:
                found = read_rows(from_hub(spec.dataset, spec.split, spec.revision), spec.dataset, **how)
            self._rows[which] = found
        return self._rows[which]

    # What the file says of names

    @cached_property
    def _things(self) -> tuple[str, ...]:
        """All names of the file: concepts, and what is kept."""
        return tuple(dict.fromkeys([*self._keys.concepts, *self._keys.keep]))

    def _size(self, which: str, spec: SetSpec) -> int:
        """How many evaluation prompts a set has: what the file says; none if no metric rests on it."""
        if spec.n is not None:
            return spec.n
        rests = {needed for name in self.metrics for needed in MEASURES[plain_name(name)[0]].needs}
        return SIZES["evaluation"].get(which, 0) if which in rests | {"erase", "clean"} else 0

    def _wordings(self, split: Split) -> list[str]:
        return wordings(getattr(self._keys.templates, split), self._keys.fill)

    def _spec(self, name: str) -> ConceptSpec:
        return self._keys.concepts.get(name) or self._keys.keep.get(name) or ConceptSpec()

    def _named(self, word: str) -> str:
        """The thing of the file that a word stands for which is none of its names; "" if there is none."""
        if word in self._things:
            return ""
        others = {name: (*self._spec(name).words, *self._plural(name)) for name in reversed(self._things)}
        return {other.casefold(): name for name, words in others.items() for other in words}.get(word.casefold(), "")

    def _plural(self, name: str) -> tuple[str, ...]:
        """The plural of an object, as its spec or as English has it."""
        return (self._spec(name).plural or plural(name),) if self._keys.kind == "object" else ()

    def _label(self, name: str) -> str:
        return self._spec(name).label or name

    def _said(self, word: str) -> str:
        """How a word stands in a sentence: of an object with its article, unless it has one."""
        if self._keys.kind != "object" or word.split()[0] in ("a", "an", "the", "two") or is_plural(word):
            return word
        return article(word)

    def _phrases(self, name: str) -> tuple[str, ...]:
        return self._spec(name).phrases or (self._said(name),)

    def _other_words(self, concept: Concept, split: Split) -> list[str]:
        """Other words for a concept, and plurals of an object: what methods are told, or what is measured and was not told."""
        spec = self._spec(concept.name)
        if self._keys.tell == "none":
            words = spec.words if split == "evaluation" else ()
        else:
            words = untold(spec.words) if split == "evaluation" else told(spec.words)
        if split == "evaluation":
            words = tuple(word for word in words if self._said(word) not in concept.phrases)
        if self._keys.kind != "object":
            return list(words)
        many = [plural(word) for word in words]
        if split == "evaluation":
            many.append(spec.plural or plural(concept.name))
        return [*map(self._said, words), *(f"two {word}" for word in many)]

    def _first(self, name: str, which: str, split: Split) -> int:
        """The first seed of a concept or thing: it keeps it whatever else is drawn."""
        index = self._things.index(name) if name in self._things else len(self._things)
        return 1_000_000 * SPLITS.index(split) + seed_offset(which) + PER_THING * index


def _in_turns(sets: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """Prompts of several sets in turns, so that the start of all holds some of each."""
    turns = itertools.zip_longest(*sets)
    return [prompt for turn in turns for prompt in turn if prompt is not None]


def _numbered(said: Iterable[tuple[str, str, str, str]], first: int) -> list[Prompt]:
    """Prompts of (text, label, set, concept), with seeds from `first`."""
    return [Prompt(text, first + k, label, which, concept) for k, (text, label, which, concept) in enumerate(said)]


def _limited(prompts: Sequence[Prompt], limit: int | None, each: bool) -> list[Prompt]:
    """The first ones, of each concept or in all."""
    if limit is None or not each:
        return list(prompts[:limit])
    counts: dict[str, int] = {}
    taken = []
    for prompt in prompts:
        counts[prompt.concept] = counts.get(prompt.concept, 0) + 1
        if counts[prompt.concept] <= limit:
            taken.append(prompt)
    return taken
