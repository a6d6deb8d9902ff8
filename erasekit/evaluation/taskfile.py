"""The TOML file of a task: its keys, and a line for every mistake in one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from erasekit.concepts import Concept, Kind
from erasekit.errors import UsageError, unknown
from erasekit.evaluation.metrics import MEASURES, split
from erasekit.evaluation.tasks import PROMPT_SETS, SPLITS, Protocol
from erasekit.evaluation.wordings import FILL, numbered, wordings
from erasekit.settings import merge, mistakes, read_toml
from erasekit.texts import one_line

SOURCES = ("prompts", "csv", "dataset")
NATURAL = Protocol(sampler="ddim", steps=50, guidance=7.5, size=512, batch=4)  # as most papers on Stable Diffusion sample
MINI = Protocol()


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SetSpec(_Part):
    """Where the evaluation prompts of a set come from: from templates, or from a list, a CSV file, a data set of the hub."""

    n: int | None = Field(None, ge=0, description="how many: of each concept or thing, or of all rows of a list or file")
    prompts: tuple[str, ...] = Field((), description="the prompts themselves")
    csv: str = Field("", description="a CSV file with a column prompt, beside the task's file")
    dataset: str = Field("", description="a data set of the hub with a column prompt or caption")
    split: str = Field("train", description="the split of the data set")
    revision: str | None = Field(None, description="the revision of the data set")
    where: tuple[str, ...] = Field((), description="conditions on columns: 'nudity_percentage > 0', 'categories ~ sexual'")
    sort: tuple[str, ...] = Field((), description="columns to sort by, '-column' from high to low")
    sha256: str = Field("", description="of the list that is meant, so that another one is told from it")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"gives {' and '.join(given)}; one of them is enough")
        if not given and (self.where or self.sort):
            raise ValueError("has conditions but neither csv nor dataset")
        return self


class ConceptSpec(_Part):
    """A concept of the file."""

    phrases: tuple[str, ...] = Field(
        (), description="the wordings it is erased by; left out, its name, of an object with an article"
    )
    words: tuple[str, ...] = Field((), description="other words for it")
    plural: str = Field("", description="of its name, where it is irregular")
    neutral: str | None = Field(None, description="what takes its place in prompts; left out, what the task or the kind says")
    preserve: tuple[str, ...] = Field((), description="what must not change with it, besides the task's other concepts")
    label: str = Field("", description="what judges call it; left out, its name")


class Templates(_Part):
    """Sentences with a `{}` for the phrase, of each split."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    evaluation: tuple[str, ...]


class TaskFile(_Part):
    """The keys of a task's TOML file."""

    name: str = Field(description="left out, the file's name")
    title: str = Field("", description="one line for tables and reports")
    domain: Literal["natural", "mini"] = Field("natural", description="of which backbones its prompts speak")
    version: int = Field(1, ge=1, description="rises when any number could change for reasons that the file does not show")
    kind: Kind = Field("free", description="of its concepts: object, identity, style, nsfw or free")
    blurred: bool = Field(False, description="images are blurred in reports")
    open: bool = Field(False, description="concepts that the file does not name are taken too")
    concepts: dict[str, ConceptSpec] = Field(
        description="a list of names, a table of names with their other words, or a file: one a line, or TOML"
    )
    keep: dict[str, ConceptSpec] = Field(
        {}, description="what is never erased and has to stay, besides other concepts; written as concepts are"
    )
    neutral: str | None = Field(None, description="what takes a concept's place in prompts; left out, what the kind says")
    tell: Literal["half", "none"] = Field(
        "half", description="how much of the other words methods are told; only what they are not told is measured"
    )
    templates: Templates = Field(description="sentences with {} for the phrase: one list, dealt out to the splits, or one each")
    fill: dict[str, tuple[str, ...]] = Field({}, description="what other gaps of the templates are filled with: {place}")
    sets: dict[str, SetSpec] = Field({}, description="evaluation prompts: a number, or where they come from")
    protocol: Protocol = Field(description="how images are drawn")
    evaluators: dict[str, dict[str, Any]] = Field({}, description="names of evaluators, or a table of settings for each")
    metrics: tuple[str, ...] = Field((), description="what is made of what the evaluators see")
    profile: str = Field("", description="which of the profiles is meant, or several: a+b")

    @model_validator(mode="before")
    @classmethod
    def _deal(cls, values: Any) -> Any:
        """One list of templates for all splits becomes one for each, and a protocol says what differs from its domain's."""
        protocol = MINI if values.get("domain") == "mini" else NATURAL
        values = {**values, "protocol": merge(protocol.model_dump(), values.get("protocol", {}))}
        templates, fill = values.get("templates"), values.get("fill", {})
        texts = isinstance(templates, list | tuple) and all(isinstance(template, str) for template in templates)
        return values | {"templates": _dealt(templates, fill), "fill": {}} if texts and isinstance(fill, dict) else values

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not name.strip(". ") or re.search(r"[/\\:]", one_line(name)):
            raise ValueError("results are filed under it: it may not be dots alone, nor hold '/', a backslash or ':'")
        return name

    @field_validator("concepts", "keep")
    @classmethod
    def _plain_names(cls, concepts: dict[str, ConceptSpec]) -> dict[str, ConceptSpec]:
        for name in concepts:
            if ":" in name or not name.strip():
                raise ValueError(
                    f"'{name}' is no name; other words stand in a list: {name.partition(':')[0] or 'cat'} = ['word']"
                )
        return concepts

    @field_validator("concepts")
    @classmethod
    def _some(cls, concepts: dict[str, ConceptSpec]) -> dict[str, ConceptSpec]:
        if not concepts:
            raise ValueError("name at least one concept")
        return concepts

    @field_validator("sets")
    @classmethod
    def _known_sets(cls, sets: dict[str, SetSpec]) -> dict[str, SetSpec]:
        for name in sets:
            if name not in PROMPT_SETS:
                raise ValueError(f"there is no set '{name}'; there are {', '.join(PROMPT_SETS)}")
        return sets

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for name in metrics:
            if split(name)[0] not in MEASURES:
                raise ValueError(f"there is no metric '{name}'; there are {', '.join(MEASURES)}")
        return metrics

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in self.metrics:
            if (judge := split(name)[1]) and judge not in self.evaluators:
                raise ValueError(f"the metric '{name}' is by a judge that 'evaluators' does not name")
        if self.metrics and not self.evaluators:
            raise ValueError("'metrics' are made of what judges see, and 'evaluators' names none")
        self._check_words()
        seen: dict[str, str] = {}
        for part in SPLITS:
            for template in getattr(self.templates, part):
                _check_template(template, self.fill)
            for wording in wordings(getattr(self.templates, part), self.fill):
                if seen.setdefault(wording, part) != part:
                    raise ValueError(f"'templates': {seen[wording]} and {part} share '{wording}'; each split needs its own")
        return self

    def _check_words(self) -> None:
        """See that no word stands for two things."""
        owners = {name.casefold(): name for name in (*self.concepts, *self.keep)}
        for name, spec in (*self.concepts.items(), *self.keep.items()):
            for word in spec.words:
                if (other := owners.setdefault(word.casefold(), name)) != name:
                    raise ValueError(f"'{word}' stands for both '{other}' and '{name}'")


def _check_template(template: str, fill: Mapping[str, Any]) -> None:
    gaps = FILL.findall(template)
    if gaps.count("") != 1:
        raise ValueError(f"'templates': '{template}' needs one {{}} for the concept")
    for gap in gaps:
        if gap and gap not in fill:
            raise ValueError(f"'templates': '{template}' has the gap {{{gap}}}, which 'fill' does not name")


class Content:
    """A task's file as it is read.

    Attributes:
        keys: what it says, under the chosen profile and with what a user says otherwise.
        profiles: the names of its profiles.
    """

    def __init__(self, path: Path, overrides: Mapping[str, Any]) -> None:
        """Read and check a file.

        Args:
            path: the TOML file; the paths in it start from its folder.
            overrides: keys that are otherwise (`-s task.KEY=VALUE`); the paths in them start from the current folder.

        Raises:
            UsageError: lists every mistake, one a line.
        """
        try:
            written = read_toml(path, "task file", "Give --task the name of a task or the path of a TOML file.")
            profiles = written.pop("profiles", {})
            if not isinstance(profiles, dict) or not all(isinstance(layer, dict) for layer in profiles.values()):
                raise UsageError("Setting 'profiles': each has to be a table of keys, as in [profiles.small].")
            chosen = str(overrides.get("profile", written.get("profile", "")))
            for name in (names := [name for name in chosen.split("+") if name]):
                if name not in profiles:
                    raise unknown("profile", name, profiles, path.name)
            layers = [(layer, path.parent) for layer in (written, *(profiles[name] for name in names))]
            values: dict[str, Any] = {"name": path.stem}
            for layer, folder in (*layers, (overrides, Path())):
                values = self._laid_over(values, layer, folder)
            self.keys = TaskFile.model_validate(values)
        except UsageError as error:
            raise UsageError(f"{path.name}: {error}") from None
        except ValidationError as error:
            lines = mistakes(error, lambda where: _unknown_key(where, path.name))
            raise UsageError("\n".join(f"{path.name}: {line}" for line in lines)) from None
        self.profiles = tuple(profiles)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides the prompts: the keys, and what is in the files that they name."""
        sets = {name: {**s.model_dump(mode="json"), "csv": bool(s.csv)} for name, s in self.keys.sets.items()}
        plain = self.keys.model_dump(mode="json", exclude={"title", "blurred", "profile"}) | {"sets": sets}
        found = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        for path in (Path(s.csv) for s in self.keys.sets.values() if s.csv):
            found.update(path.read_bytes() if path.is_file() else b"")
        return found.hexdigest()

    def _laid_over(self, values: dict[str, Any], layer: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Keys with a layer's over them: tables are merged, and what is no table takes the place of what was there."""
        plain = self._plain(layer, folder)
        whole = {key for key in ("concepts", "keep", "evaluators") if not isinstance(layer.get(key, {}), dict)}
        merged: dict[str, Any] = merge({key: value for key, value in values.items() if key not in whole}, plain)
        for name, given in _table(plain.get("sets")).items():
            if isinstance(given, dict) and any(given.get(key) for key in SOURCES):  # a new source, so no more the old one
                before = _table(_table(values.get("sets")).get(name))
                counted = {"n"} if not any(before.get(key) for key in SOURCES) else set()  # how many were made from templates
                gone = {*SOURCES, *counted} - given.keys()
                merged["sets"] = merged["sets"] | {name: {k: v for k, v in merged["sets"][name].items() if k not in gone}}
        return merged

    def _plain(self, layer: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """A layer with every short form written out, and its paths starting from `folder`."""
        plain = dict(layer)
        for key in ("concepts", "keep"):
            if key in plain:
                plain[key] = _concepts(plain[key], folder, key)
        if isinstance(plain.get("evaluators"), list | tuple):
            plain["evaluators"] = {str(name): {} for name in plain["evaluators"]}
        if isinstance(plain.get("sets"), dict):
            plain["sets"] = {name: _as_set(given, folder) for name, given in plain["sets"].items()}
        return plain


def _concepts(given: Any, folder: Path, key: str) -> Any:
    """{name: keys} of a list, of a table that may have bare lists of words, or of a file."""
    if isinstance(given, str):
        path = folder / Path(given).expanduser()
        if path.suffix == ".toml":
            return _concepts(read_toml(path, "file of concepts", f"Check the key '{key}'."), folder, key)
        parsed = [Concept.parse(line) for line in _lines(path, key)]
        return {concept.name: {"words": concept.phrases[1:]} for concept in parsed}
    if isinstance(given, list | tuple):
        return {str(name): {} for name in given}
    if isinstance(given, dict):
        return {name: {"words": keys} if isinstance(keys, list | tuple) else keys for name, keys in given.items()}
    return given


def _table(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}


def _lines(path: Path, key: str) -> tuple[str, ...]:
    """The lines of a text file, without comments and empty ones."""
    try:
        lines = [line.partition("#")[0].strip() for line in path.expanduser().read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"Cannot read '{path}' of the key '{key}': {reason}. Give a text file with one name a line.") from None
    return tuple(line for line in lines if line)


def _as_set(given: Any, folder: Path) -> Any:
    """A set's keys: a number is how many, a list is the prompts; the path of a CSV file starts from `folder`."""
    if isinstance(given, int) and not isinstance(given, bool):
        return {"n": given}
    if isinstance(given, list | tuple):
        return {"prompts": given} if given else {"n": 0}
    if isinstance(given, dict) and isinstance(given.get("csv"), str) and given["csv"]:
        return {**given, "csv": str(folder / Path(given["csv"]).expanduser())}
    return given


def _dealt(templates: Sequence[str], fill: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """One list of templates dealt out to the splits: every third wording, so that each split has all templates and gaps.

    Raises:
        ValueError: a template has no place for the concept, or a gap that nothing fills.
    """
    for template in templates:
        _check_template(template, fill)
    found: dict[str, list[str]] = {part: [] for part in SPLITS}
    for wording, number in numbered(templates, fill):
        found[SPLITS[number % 3]].append(wording)
    if empty := [part for part, of in found.items() if not of]:
        raise ValueError(f"'templates' leaves no sentence for {empty[0]}; it needs at least three")
    return found


def _unknown_key(where: str, file: str) -> str:
    """The line for a key that there is not, with those that there are at its place."""
    place = where.split(".")
    inside: dict[str, type[BaseModel]] = {
        "sets": SetSpec,
        "concepts": ConceptSpec,
        "protocol": Protocol,
        "templates": Templates,
    }
    model = inside.get(place[0], TaskFile) if len(place) > 1 else TaskFile
    names = list(model.model_fields)
    prefix = where.rpartition(".")[0]
    line = str(unknown("key", where, [f"{prefix}.{n}" if prefix else n for n in names], file))
    return f"{line.rpartition(' See ')[0]} There are {', '.join(names)}."
