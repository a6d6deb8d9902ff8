"""An erasure that exists already is measured by what its file says: the method that made it need not be installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict

from erasekit.backbones.memory import Footprint
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.method import Method, MethodConfig


class GivenConfig(MethodConfig):
    """The settings that an erasure was made with, whatever they are."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Given(Method):
    """Stands in a plan for the method that made an erasure. It asks for no prompts and no memory, and erases nothing."""

    name = "given"
    Config = GivenConfig

    def footprint(self, plan: Planned) -> Footprint:
        """Nothing is trained."""
        return Footprint()

    def texts(self, ctx: RunContext) -> list[str]:
        """Nothing is encoded for it."""
        return []


def stand_in(manifest: Mapping[str, Any]) -> tuple[type[Given], GivenConfig]:
    """What a plan has in the place of a method and its settings, from the content of `erasure.json`."""
    return Given, GivenConfig(**manifest["config"])
