"""From flags, a TOML file and overrides to one frozen plan of a run, with every mistake listed at once."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from erasekit.concepts import EMPTY_PROMPT, Concept, Kind
from erasekit.errors import UsageError, unknown
from erasekit.safety import is_unsafe, reject_unsafe

if TYPE_CHECKING:
    from erasekit.backbone import Backbone, BackboneConfig
    from erasekit.method import Method, MethodConfig
    from erasekit.plugins import Registries
    from erasekit.tasks import Protocol, Task


DEFAULT_TASKS = {"mini": "objects", "natural": "free"}


class Options(BaseModel):
    """Settings of the parts of a run that differ from their defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: dict[str, Any] = Field(default_factory=dict, description="settings of the method")
    backbone: dict[str, Any] = Field(default_factory=dict, description="settings of the backbone")
    protocol: dict[str, Any] = Field(default_factory=dict, description="how pictures are drawn")


class RunConfig(BaseModel):
    """What a user asks for. `--config` files have the same keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field("trace", description="the erasure method")
    backbone: str = Field("sd15-mini", description="the model to erase from")
    task: str = Field(
        "",
        description="what is measured, the task of that name in the backbone's domain; left out, objects of the mini domain "
        "or, for natural pictures, free",
    )
    concepts: tuple[str, ...] = Field(
        (), description="what to erase, together; empty: each of the task's concepts, one run each"
    )
    kind: Kind | None = Field(
        None, description="what the concepts are, where the task leaves it open: object, identity, style, nsfw or free"
    )
    neutral: str | None = Field(
        None,
        description=f"what takes the place of the concepts' words; '' drops them, '{EMPTY_PROMPT}' empties the prompt; left "
        "out, what the task says",
    )
    preserve: tuple[str, ...] = Field((), description="further things that must not change: things of the concepts' kind")
    seed: int = Field(0, ge=0, description="the seed of everything random")
    limit: int | None = Field(None, ge=1, description="the most pictures per prompt set")
    preset: str = Field("", description="a named set of the method's settings")
    files: Literal["float32", "float16", "bfloat16"] = Field("float32", description="type of the erasure's tensors on disk")
    options: Options = Field(default_factory=Options, description="settings of the method, the backbone and the protocol")


@dataclass(frozen=True)
class Plan:
    """A configuration with every name looked up and every setting checked.

    Attributes:
        config: what was asked for, with registered names in place of aliases.
        separate: each concept is a run of its own, and this plan is their summary.
        erasure_sha256: of the erasure that is measured, if it is not computed by this plan.
    """

    config: RunConfig
    backbone: type[Backbone]
    backbone_config: BackboneConfig
    method: type[Method]
    method_config: MethodConfig
    task: Task
    concepts: tuple[Concept, ...]
    protocol: Protocol
    separate: bool = False
    erasure_sha256: str = ""

    @property
    def hash(self) -> str:
        """Eight hex digits over all that decides the result, resolved: equal runs spelled differently are one."""
        content = {
            **self.config.model_dump(include={"method", "backbone", "task", "seed", "limit"}),
            "task_version": self.task.version,
            "method_version": self.method.version,
            "separate": self.separate,
            "erasure": self.erasure_sha256,
            "concepts": [c.model_dump() for c in self.concepts],
            "settings": [c.model_dump(mode="json") for c in (self.backbone_config, self.method_config, self.protocol)],
        }
        if self.config.files != "float32":  # the name of a run does not change with a setting that is as it always was
            content["files"] = self.config.files
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def singles(self) -> list[Plan]:
        """One plan per concept of a separate plan."""
        names = [c.name for c in self.concepts]
        configs = [self.config.model_copy(update={"concepts": (name,)}) for name in names]
        return [replace(self, config=k, concepts=(c,), separate=False) for k, c in zip(configs, self.concepts, strict=True)]


def read(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: there is none, or it is not TOML; says the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"No config file '{path}'. Give --config the path of a TOML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the config file '{path}': {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"'{path}' is not TOML: {error}.") from None


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Read `part.key=value` overrides; a value is a TOML value, or else text.

    Raises:
        UsageError: one of them has no "part.key=" in front.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or len(path) < 2 or not all(path):
            raise UsageError(f"Cannot read the setting '{text}'. Write method.key=value, backbone.key=... or protocol.key=...")
        place = options
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(f"The setting '{text}' contradicts an earlier one for '{part}'. Give one of them.")
        place[path[-1]] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def build(flags: Mapping[str, Any], *, file: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Put together a configuration: the file first, flags that were given over it, overrides over both.

    Raises:
        UsageError: lists every mistake.
    """
    values = read(file) if file else {}
    values |= {key: value for key, value in flags.items() if value not in (None, ())}
    values["options"] = _merge(values.get("options", {}), parse_overrides(overrides))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n".join(_mistakes(error, RunConfig))) from None


def _merge(base: Any, over: Mapping[str, Any]) -> Any:
    if not isinstance(base, dict):
        return base  # left for validation to name
    both = {k: _merge(base[k], v) if isinstance(base.get(k), dict) and isinstance(v, dict) else v for k, v in over.items()}
    return base | both


def _mistakes(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per fault that pydantic found."""
    lines = []
    for fault in error.errors(include_url=False):
        where = prefix + ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            fields = {**model.model_fields, **({} if prefix else {f"options.{k}": None for k in Options.model_fields})}
            lines.append(str(unknown("setting", where, [prefix + name for name in fields], "erasekit run --dry-run")))
        else:
            given = "" if fault["type"] == "missing" else f", given {fault['input']!r}"
            lines.append(f"Setting '{where}': {fault['msg'][0].lower()}{fault['msg'][1:]}{given}.")
    return lines


class _Mistakes:
    """Collects errors, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def attempt(self, function: Any, *arguments: Any) -> Any:
        """The function's value, or None and its error noted."""
        try:
            return function(*arguments)
        except UsageError as error:
            self.lines.append(str(error))
            return None


def settings_of(model: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    """Validated settings; `prefix` ("method.") is how a user writes them.

    Raises:
        UsageError: lists every fault, one a line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n".join(_mistakes(error, model, prefix))) from None


def resolve(config: RunConfig, registries: Registries) -> Plan:
    """Look up every name and check every setting, before anything is loaded.

    Raises:
        UsageError: one line for each mistake.
        BrokenPlugin: a chosen name belongs to a plugin that cannot be loaded.
    """
    from erasekit.preflight import fitted

    faults = _Mistakes()
    method_entry = faults.attempt(registries.methods.entry, config.method)
    backbone_entry = faults.attempt(registries.backbones.entry, config.backbone)
    method = method_entry and method_entry.load()
    backbone = backbone_entry and backbone_entry.load()
    task_name = config.task or DEFAULT_TASKS[backbone.domain if backbone else "mini"]
    task = backbone and faults.attempt(_task, task_name, backbone.domain, registries)

    options = config.options
    backbone_config = backbone and faults.attempt(settings_of, backbone.Config, options.backbone, "backbone.")
    method_config = method and faults.attempt(_method_config, method, backbone_entry, backbone, config)
    values = task and backbone and _sampling(task, backbone) | options.protocol
    protocol = task and faults.attempt(settings_of, type(task.protocol), values, "protocol.")
    concepts = _concepts(task, config, faults) if task else ()
    faults.lines += _unsafe(concepts, method_config.model_dump()) if method_config else []
    for slot, choice in _choices(method, method_config) if method_config else ():
        faults.attempt(registries.components.entry_of, slot, choice)
    if method and backbone:
        faults.lines += _unmet(method_entry.name, method, backbone_entry.name, backbone)
    if faults.lines:
        raise UsageError("\n".join(faults.lines))
    names = {"method": method_entry.name, "backbone": backbone_entry.name, "task": task_name.split("/")[-1]}
    separate = not config.concepts and len(concepts) > 1
    canonical = config.model_copy(update=names)
    plan = Plan(canonical, backbone, backbone_config, method, method_config, task, concepts, protocol, separate)
    return fitted(plan)


def _sampling(task: Any, backbone: Any) -> dict[str, Any]:
    """The task's protocol, with what the backbone needs otherwise."""
    values: dict[str, Any] = task.protocol.model_dump() | dict(backbone.sampling)
    return values


def _task(name: str, domain: str, registries: Registries) -> Any:
    target = registries.tasks.get(name, domain)
    task = target() if isinstance(target, type) else target
    for evaluator in task.evaluators:
        registries.evaluators.entry(evaluator)
    return task


def _method_config(method: Any, backbone_entry: Any, backbone: Any, config: RunConfig) -> Any:
    """The method's settings: its own, then the backbone's family's and name's, then the preset's, then the user's."""
    if config.preset and config.preset not in method.presets:
        raise unknown(f"preset of '{config.method}'", config.preset, method.presets, "erasekit ls methods")
    layers = [method.presets.get(config.preset, {}), config.options.method]
    if backbone:
        layers = [method.defaults.get(backbone.capabilities.family, {}), method.defaults.get(backbone_entry.name, {}), *layers]
    values: dict[str, Any] = {}
    for layer in layers:
        values = _merge(values, layer)
    return settings_of(method.Config, values, "method.")


def _choices(method: Any, config: Any) -> list[tuple[str, str]]:
    """The components that a method's settings name, as (slot, name)."""
    values = [(slot, getattr(config, slot)) for slot in method.slots]
    return [(slot, name) for slot, value in values for name in ([value] if isinstance(value, str) else value)]


def _concepts(task: Any, config: RunConfig, faults: _Mistakes) -> tuple[Any, ...]:
    texts = config.concepts or task.concepts
    if not texts:
        faults.lines.append(f"The task '{task.name}' declares no concepts. Name one: --concept 'a cat'.")
    concepts = [_as_asked(c, config, faults) for c in (faults.attempt(task.concept, text) for text in texts) if c]
    for concept in concepts:
        prompts = concept.prompts()
        faults.attempt(reject_unsafe, [*prompts, *map(concept.neutralise, prompts), *concept.preserve])
    names = [c.name for c in concepts]
    twice = sorted({n for n in names if names.count(n) > 1})
    faults.lines += [f"The concept '{n}' is given twice. Give it once." for n in twice]
    return tuple(concepts)


def _as_asked(concept: Concept, config: RunConfig, faults: _Mistakes) -> Concept:
    """The task's concept with the kind, the neutral words and the preserved things that a user gives."""
    if config.kind and concept.kind not in ("free", config.kind):
        line = f"'{concept.name}' is of kind {concept.kind} in its task, given --kind {config.kind}. Leave --kind out."
        faults.lines.append(line)
    if config.kind and concept.kind == "free":
        concept = concept.of_kind(config.kind)
    neutral = {} if config.neutral is None else {"neutral": " ".join(config.neutral.split())}
    return concept.model_copy(update=neutral | {"preserve": tuple(dict.fromkeys((*config.preserve, *concept.preserve)))})


def _unsafe(concepts: Sequence[Concept], settings: Any) -> list[str]:
    """A line if a setting (a guide, say) makes of a concept what may not be drawn."""
    said = [phrase for concept in concepts for phrase in (*concept.phrases, *concept.preserve, concept.neutral)]
    if any(is_unsafe(f"{phrase} {text}") for phrase in said for text in _texts(settings)):
        return ["A concept and a setting of the method pair minors with sexual terms, which erasekit refuses. Change it."]
    return []


def _texts(value: Any) -> list[str]:
    """All texts in a setting, however deep."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _texts(part)]


def _unmet(method_name: str, method: Any, backbone_name: str, backbone: Any) -> list[str]:
    """One line per capability that the method needs and the backbone lacks."""
    from erasekit.backbone import Capabilities

    has = backbone.capabilities
    field_of = {choice: field for field, hint in get_type_hints(Capabilities).items() for choice in get_args(hint)}
    verbs = {"family": "is a", "prediction": "predicts", "guidance": "has guidance"}
    lines = []
    for need in sorted(method.requires - has.names()):
        field = field_of.get(need)
        fact = f"'{backbone_name}' {verbs[field]} {getattr(has, field)}" if field else "no backbone has that"
        lines.append(f"'{method_name}' needs {need}; {fact}.")
    return lines


def to_toml(config: RunConfig) -> str:
    """The configuration as a TOML file that `--config` reads back to the same configuration."""
    values = config.model_dump(mode="json", exclude_none=True, exclude={"options"})
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    for part, settings in config.options.model_dump(mode="json", exclude_none=True).items():
        if settings:
            lines += ["", f"[options.{part}]", *(f"{_toml(key)} = {_toml(value)}" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
