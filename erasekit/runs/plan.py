"""The plan of a run: a configuration with every name looked up and every setting checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from erasekit.concepts import Concept
from erasekit.runs.config import RunConfig

if TYPE_CHECKING:  # they import torch
    from erasekit.attacks.attack import Attack, AttackConfig
    from erasekit.backbones.protocol import Backbone, BackboneConfig
    from erasekit.evaluation.evaluators import EvaluatorConfig
    from erasekit.evaluation.tasks import Protocol, Task
    from erasekit.methods.component import Component
    from erasekit.methods.method import Method, MethodConfig


@dataclass(frozen=True)
class Plan:
    """A configuration with every name looked up and every setting checked.

    Attributes:
        config: what was asked for, with registered names in place of aliases.
        evaluators: the settings of each of the task's evaluators.
        separate: each concept is a run of its own, and this plan is their summary.
        erasure_sha256: of the erasure that is measured, if it is not computed by this plan.
        components: those of the method's components that have settings, with them, by slot and name.
        attacks: what tries to bring the concepts back: name, class, settings.
        only_attacks: nothing else is measured.
        sources: digests of code that does not come with erasekit, and versions of components.
        erasing_sources: those of them that the erasure depends on: not the evaluators' and the attacks'.
    """

    config: RunConfig
    backbone: type[Backbone]
    backbone_config: BackboneConfig
    method: type[Method]
    method_config: MethodConfig
    task: Task
    concepts: tuple[Concept, ...]
    protocol: Protocol
    evaluators: Mapping[str, EvaluatorConfig] = field(default_factory=dict)
    separate: bool = False
    erasure_sha256: str = ""
    components: Mapping[tuple[str, str], Component] = field(default_factory=dict)
    attacks: tuple[tuple[str, type[Attack], AttackConfig], ...] = ()
    only_attacks: bool = False
    sources: tuple[str, ...] = ()
    erasing_sources: tuple[str, ...] = ()

    @property
    def task_name(self) -> str:
        """What the task is called in results and in folders: of a file, what the file says."""
        return self.task.name if self.config.task.endswith(".toml") else self.config.task

    @property
    def hash(self) -> str:
        """Eight hex digits over all that decides the result, resolved: equal runs spelled differently are one."""
        content = self._deciding(self.sources)
        content |= {"limit": self.config.limit, "separate": self.separate, "erasure": self.erasure_sha256}
        if judged := {name: settings for name, c in self.evaluators.items() if (settings := c.model_dump(mode="json"))}:
            content["evaluators"] = judged
        if self.attacks:
            content["attacks"] = [*self.budgets(), self.only_attacks, self.config.keep_texts]
        return _digest(content)

    @property
    def erasing(self) -> str:
        """Eight hex digits over all that decides the erasure: runs that measure it differently have it in common."""
        content = self._deciding(self.erasing_sources)
        if not self.method(self.method_config).seeded:
            del content["seed"]
        return _digest(content)

    def _deciding(self, sources: tuple[str, ...]) -> dict[str, Any]:
        """All that decides the erasure, resolved; `sources` as in the attribute."""
        content: dict[str, Any] = {
            **self.config.model_dump(include={"method", "backbone", "seed"}),
            "task": self.task_name,
            "task_version": self.task.version,
            "method_version": self.method.version,
            "concepts": [c.model_dump() for c in self.concepts],
            "settings": [c.model_dump(mode="json") for c in (self.backbone_config, self.method_config, self.protocol)],
        }
        if self.config.files != "float32":  # the name of a run does not change with a setting that is as it always was
            content["files"] = self.config.files
        on = self.backbone.capabilities.family, self.config.backbone
        unusual = {"/".join(key): c.config for key, c in self.components.items() if c.config != c.usual(*on)}
        if unusual:
            content["components"] = {key: settings.model_dump(mode="json") for key, settings in unusual.items()}
        if self.task.digest:
            content["task_content"] = self.task.digest
        if sources:
            content["sources"] = sources
        return content

    @property
    def seeded(self) -> bool:
        """Whether another seed gives other numbers: attacks search at random, whatever the method does."""
        return bool(self.attacks) or self.method(self.method_config).seeded

    def budgets(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Name, version and settings of every attack."""
        return [(name, attack.version, config.budget()) for name, attack, config in self.attacks]

    def settings(self) -> dict[str, Any]:
        """The settings of the method and of the protocol, resolved: {"method.KEY": value, "protocol.KEY": value}."""
        parts = {"method": self.method_config, "protocol": self.protocol}
        return {f"{part}.{key}": v for part, values in parts.items() for key, v in values.model_dump(mode="json").items()}

    def singles(self) -> list[Plan]:
        """One plan per concept of a separate plan."""
        names = [c.name for c in self.concepts]
        configs = [self.config.model_copy(update={"concepts": (name,)}) for name in names]
        return [replace(self, config=k, concepts=(c,), separate=False) for k, c in zip(configs, self.concepts, strict=True)]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
