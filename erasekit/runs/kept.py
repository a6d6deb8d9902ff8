"""The loaded model of one run, for the next one that wants the same."""

from __future__ import annotations

from typing import Any

from erasekit.backbones.protocol import Backbone
from erasekit.runs.plan import Plan


class Kept:
    """Holds on to the model that was loaded last: runs that come one after the other need not load it again.

    A run gives it back as it was; `Backbone.renew` sees to what a run that failed has left on it.
    """

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._wanted: Any = None
        self._backbone: Backbone | None = None

    def has(self, plan: Plan) -> bool:
        """Whether the plan's model is the one that is loaded."""
        return self._backbone is not None and self._wanted == (plan.backbone, plan.backbone_config)

    def load(self, plan: Plan) -> Backbone:
        """The plan's model, loaded unless it is at hand; another one goes first, so that there is never room for two needed.

        Raises:
            EnvironmentProblem: its weights cannot be loaded.
        """
        if self._backbone is not None and self.has(plan):
            self._backbone.renew()
            return self._backbone
        self.drop()
        self._backbone, self._wanted = plan.backbone.load(plan.backbone_config), (plan.backbone, plan.backbone_config)
        return self._backbone

    def drop(self) -> None:
        """Let go of the model."""
        if self._backbone is not None:
            for part in ("denoiser", "vae", "text_encoders"):
                self._backbone.release(part)
        self._backbone = None
