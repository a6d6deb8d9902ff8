"""From a configuration to a plan: every mistake in it is listed at once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from erasekit.concepts import Concept, contradictions
from erasekit.errors import UsageError, unknown
from erasekit.evaluation.finding import find_task
from erasekit.registration.owed import owed
from erasekit.registration.plugins import Registries
from erasekit.registration.source import source_digest
from erasekit.runs.config import RunConfig, settings_of
from erasekit.runs.plan import Plan
from erasekit.runs.preflight import fitted
from erasekit.safety import is_unsafe, reject_unsafe
from erasekit.settings import layered, merge

if TYPE_CHECKING:  # they import torch
    from erasekit.backbones.protocol import Backbone
    from erasekit.evaluation.tasks import Protocol
    from erasekit.methods.component import Component

DEFAULT_TASKS = {"mini": "objects", "natural": "free"}


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


def resolve(config: RunConfig, registries: Registries, *, given: Mapping[str, Any] | None = None) -> Plan:
    """Look up every name and check every setting, before anything is loaded.

    Args:
        config: what a user asks for.
        registries: what names stand for.
        given: the manifest of an erasure that is measured; the method that made it is not looked up.

    Raises:
        UsageError: one line for each mistake.
        BrokenPlugin: a chosen name belongs to a plugin that cannot be loaded.
    """
    faults, options = _Mistakes(), config.options
    backbone_entry = faults.attempt(registries.backbones.entry, config.backbone)
    backbone = backbone_entry and backbone_entry.load()
    task_name = config.task or DEFAULT_TASKS[backbone.domain if backbone else "mini"]
    task = backbone and faults.attempt(_task, task_name, backbone.domain, registries, options.task)

    backbone_config = backbone and faults.attempt(settings_of, backbone.Config, options.backbone, "backbone.")
    if given is None:
        method_name, method, method_config = _method(config, backbone_entry, registries, faults)
        chosen = _choices(method, method_config) if method_config else []
        components = _components(config, chosen, backbone_entry, registries, faults)
    else:
        from erasekit.runs.given import stand_in  # imports torch

        method_name, method, method_config, components = given["method"], *stand_in(given), {}
    values = task and backbone and _sampling(task, backbone) | options.protocol
    protocol = task and faults.attempt(settings_of, type(task.protocol), values, "protocol.")
    evaluators = _evaluators(task, options.evaluators, registries, faults) if task else {}
    concepts = _concepts(task, config, faults) if task else ()
    faults.lines += _unsafe(concepts, method_config.model_dump()) if method_config else []
    attacks = _attacks(config, registries, backbone_entry, backbone, task, faults) if backbone else ()
    if faults.lines:
        raise UsageError("\n".join(faults.lines))
    task_name = task_name if task_name.endswith(".toml") else task_name.split("/")[-1]
    names = {"method": method_name, "backbone": backbone_entry.name, "task": task_name}
    separate = not config.concepts and len(concepts) > 1
    canonical = config.model_copy(update=names)
    parts = (backbone, backbone_config, method, method_config, task, concepts, protocol, evaluators, separate)
    erasing = _sources(registries, canonical, task, method_config, given)
    measuring = _measuring_sources(registries, canonical, task)
    every = tuple(sorted({*erasing, *measuring}))
    plan = Plan(canonical, *parts, components=components, attacks=attacks, sources=every, erasing_sources=erasing)
    check_drawing(backbone, protocol)
    method(method_config).check(plan)
    return fitted(plan)


def _sources(registries: Registries, config: RunConfig, task: Any, values: Any, given: Any) -> tuple[str, ...]:
    """What decides an erasure beside settings: digests of foreign code, and versions of components from the second on."""
    versions = list[str]()
    modules = [type(task).__module__, registries.backbones.entry(config.backbone).module]
    if given is None:
        method = registries.methods.entry(config.method)
        choices = [registries.components.entry_of(*choice) for choice in _choices(method.load(), values)]
        modules += [entry.module for entry in (method, *choices)]
        versions = [f"{entry.name}@{entry.version}" for entry in choices if entry.version > 1]
    return (*_digests(modules), *versions)


def _measuring_sources(registries: Registries, config: RunConfig, task: Any) -> tuple[str, ...]:
    """The same of evaluators and attacks."""
    judging, attacking = map(registries.evaluators.entry, task.evaluators), map(registries.attacks.entry, config.attacks)
    return _digests([entry.module for entry in (*judging, *attacking)])


def _digests(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({digest for module in modules if (digest := source_digest(module))}))


def check_drawing(backbone: type[Backbone], protocol: Protocol) -> None:
    """See that a backbone can draw as a protocol says.

    Raises:
        UsageError: it cannot.
    """
    if protocol.sampler != "default" and backbone.capabilities.prediction == "velocity":
        advice = "Use '-s protocol.sampler=default'."
        raise UsageError(f"The sampler '{protocol.sampler}' cannot draw with '{backbone.name}'. {advice}")
    step = getattr(backbone, "size_step", 1)
    if protocol.size % step:
        near = max(step, protocol.size - protocol.size % step)
        raise UsageError(f"'{backbone.name}' draws images whose side is a multiple of {step}; use '-s protocol.size={near}'.")


def _sampling(task: Any, backbone: Any) -> dict[str, Any]:
    """The task's protocol, with what the backbone needs otherwise."""
    values: dict[str, Any] = task.protocol.model_dump() | dict(backbone.sampling)
    return values


def _task(name: str, domain: str, registries: Registries, overrides: Mapping[str, Any]) -> Any:
    task = find_task(name, domain, registries, overrides)
    for evaluator in task.evaluators:
        registries.evaluators.entry(evaluator)
    return task


def _evaluators(task: Any, asked: Mapping[str, Any], registries: Registries, faults: _Mistakes) -> dict[str, Any]:
    """The settings of each of the task's evaluators: its own, then the task's, then the user's.

    One that tells names apart (`labels`) is given the task's, if nobody names others.
    """
    for name in asked.keys() - set(task.evaluators):
        judges = f"it has {', '.join(task.evaluators)}" if task.evaluators else "it has none"
        faults.lines.append(f"The task '{task.name}' has no evaluator '{name}' to set; {judges}.")
    found = {}
    for name in task.evaluators:
        config = _class(registries.evaluators.entry(name), "evaluator").Config
        names = {"labels": task.labels} if "labels" in config.model_fields else {}
        values = merge(names | dict(task.evaluator_settings.get(name, {})), asked.get(name, {}))
        found[name] = faults.attempt(settings_of, config, values, f"evaluators.{name}.")
    return found


def _method(config: RunConfig, backbone_entry: Any, registries: Registries, faults: _Mistakes) -> tuple[str, Any, Any]:
    """The method's name, its class and its settings."""
    entry = faults.attempt(registries.methods.entry, config.method)
    if not entry:
        return "", None, None
    method, backbone = faults.attempt(_class, entry, "method"), backbone_entry and backbone_entry.load()
    if method is None:
        return "", None, None
    values = faults.attempt(_method_config, method, backbone_entry, backbone, config)
    if backbone:
        faults.lines += _unmet(entry.name, method, backbone_entry.name, backbone)
    return entry.name, method, values


def _class(entry: Any, kind: str) -> Any:
    """The class behind a name, if it is what it should be."""
    from erasekit.attacks.attack import Attack  # these import torch
    from erasekit.evaluation.evaluators import Evaluator
    from erasekit.methods.method import Method

    owes: dict[str, tuple[type, tuple[str, ...]]] = {
        "method": (Method, ("erase",)),
        "evaluator": (Evaluator, ("describe", "update", "compute")),
        "attack": (Attack, ("rounds",)),
    }
    found = entry.load()
    owed(f"The {kind} '{entry.name}'", found, *owes[kind])
    return found


def _method_config(method: Any, backbone_entry: Any, backbone: Any, config: RunConfig) -> Any:
    """The method's settings: its own, then the backbone's family's and name's, then the preset's, then the user's."""
    if config.preset and config.preset not in method.presets:
        raise unknown(f"preset of '{config.method}'", config.preset, method.presets, "erasekit ls methods")
    on = (backbone.capabilities.family, backbone_entry.name) if backbone else ("", "")
    values = layered(method.defaults, *on, method.presets.get(config.preset, {}), config.options.method)
    return settings_of(method.Config, values, "method.")


def _components(
    config: RunConfig, chosen: Sequence[tuple[str, str]], backbone_entry: Any, registries: Registries, faults: _Mistakes
) -> dict[tuple[str, str], Component]:
    """Of the method's components those that have settings, with them, by slot and name."""
    from erasekit.methods.component import Component  # imports torch

    found: dict[tuple[str, str], Component] = {}
    asked, backbone = config.options.components, backbone_entry and backbone_entry.load()
    for slot, name in chosen:
        entry = faults.attempt(registries.components.entry_of, slot, name)
        kind = entry and entry.load()
        if backbone and isinstance(kind, type) and issubclass(kind, Component):
            on = backbone.capabilities.family, backbone_entry.name
            values = layered(kind.defaults, *on, asked.get(name, {}))
            found[slot, name] = kind(faults.attempt(settings_of, kind.Config, values, f"components.{name}."))
    for name in sorted(asked.keys() - {name for _, name in found}) if backbone else ():
        said = "has no settings" if name in {name for _, name in chosen} else "is not chosen"
        faults.lines.append(f"There are settings for the component '{name}', which {said}. See 'erasekit ls components'.")
    return found


def _attacks(
    config: RunConfig, registries: Registries, backbone_entry: Any, backbone: Any, task: Any, faults: _Mistakes
) -> tuple[tuple[str, Any, Any], ...]:
    """The attacks with their settings: their own defaults, the backbone's family's and name's, then the user's."""
    found: list[tuple[str, Any, Any]] = []
    if config.attacks and task and not task.evaluators:
        faults.lines.append(f"Attacks are judged by the task's evaluators; '{task.name}' has none. Choose another task.")
    for name in dict.fromkeys(config.attacks):
        entry = faults.attempt(registries.attacks.entry, name)
        if entry is None:
            continue
        attack = faults.attempt(_class, entry, "attack")
        if attack is None:
            continue
        asked = config.options.attacks.get(name, config.options.attacks.get(entry.name, {}))
        values = layered(attack.defaults, backbone.capabilities.family, backbone_entry.name, asked)
        settings = faults.attempt(settings_of, attack.Config, values, f"attacks.{entry.name}.")
        faults.lines += _unmet(entry.name, attack, backbone_entry.name, backbone)
        found.append((entry.name, attack, settings))
    named = {name for name in config.options.attacks if name not in config.attacks}
    faults.lines += [f"There are settings for the attack '{name}', which is not chosen. Add --attack {name}." for name in named]
    return tuple(found)


def _choices(method: Any, config: Any) -> list[tuple[str, str]]:
    """The components that a method's settings name, as (slot, name)."""
    values = [(slot, getattr(config, slot)) for slot in method.slots]
    return [(slot, name) for slot, value in values for name in ([value] if isinstance(value, str) else value)]


def _concepts(task: Any, config: RunConfig, faults: _Mistakes) -> tuple[Any, ...]:
    texts = config.concepts or task.concepts
    if not texts:
        faults.lines.append(f"The task '{task.name}' declares no concepts. Name one: --concept 'a cat'.")
    found = [c for c in (faults.attempt(task.concept, text) for text in texts) if c]
    if other := [c for c in found if not isinstance(c, Concept)]:
        raise UsageError(f"The task '{task.name}' returns {type(other[0]).__name__} from 'concept', not an erasekit.Concept.")
    concepts = [_as_asked(c, config, faults) for c in found]
    for concept in concepts:
        prompts = concept.prompts()
        faults.attempt(reject_unsafe, [*prompts, *map(concept.neutralise, prompts), *concept.preserve])
    names = [c.name.casefold() for c in concepts]
    twice = dict.fromkeys(c.name for i, c in enumerate(concepts) if c.name.casefold() in names[:i])
    faults.lines += [f"The concept '{n}' is given twice. Give it once." for n in twice] or contradictions(concepts)
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
    from erasekit.backbones.protocol import Capabilities  # imports torch

    has = backbone.capabilities
    field_of = {choice: field for field, hint in get_type_hints(Capabilities).items() for choice in get_args(hint)}
    verbs = {"family": "is a", "prediction": "predicts", "guidance": "has guidance", "text": "reads text"}
    lines = []
    for need in sorted(method.requires - has.names()):
        field = field_of.get(need)
        fact = f"'{backbone_name}' {verbs[field]} {getattr(has, field)}" if field else "no backbone has that"
        lines.append(f"'{method_name}' needs {need}; {fact}.")
    return lines
