"""The base of components that have settings of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from erasekit.backbones.memory import Footprint
from erasekit.methods.context import Planned
from erasekit.settings import Settings, layered


class Component:
    """A choice for a slot of a method, with settings: `-s components.NAME.KEY=VALUE`. Without settings a function will do.

    Methods are given an instance wherever they would be given the function. Subclasses implement `__call__` with the
    arguments of their slot.

    Attributes:
        Config: the settings; field descriptions are the documentation.
        defaults: settings that differ per backbone name or family.
    """

    Config: ClassVar[type[Settings]] = Settings
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, config: Any) -> None:
        """Keep the validated settings, an instance of `Config`."""
        self.config = config

    @classmethod
    def usual(cls, family: str, backbone: str) -> Settings:
        """The settings on a backbone where nobody asks for others."""
        return cls.Config.model_validate(layered(cls.defaults, family, backbone))

    def footprint(self, plan: Planned) -> Footprint:
        """What a training step of the component holds at once, from which its memory is predicted; by default nothing."""
        return Footprint()

    def rows(self, plan: Planned) -> float:
        """About how many rows of the denoiser it predicts for a concept, those with gradients three times; by default none."""
        return 0.0
