"""The base of every erasure method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from erasekit.backbones.memory import LORA_GB, Footprint
from erasekit.erasures.deltas import Deltas
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.guidance import Guidance
from erasekit.methods.checks import check_deltas
from erasekit.methods.context import Planned, RunContext
from erasekit.methods.prompts import training_texts
from erasekit.settings import Settings

# A setting that takes one name or several.
OneOrSeveral = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
# Of a setting that may be left open: TOML has no word for it, so that `-s method.KEY=none` arrives as text.
OrNone = BeforeValidator(lambda value: None if value == "none" else value)


class MethodConfig(Settings):
    """Base of every method's settings: frozen, and unknown keys are errors."""


class Method:
    """An erasure method. Subclasses set the class attributes and implement `erase`.

    Attributes:
        name: the registered name.
        version: rises when equal settings give another erasure, so that no run or erasure of before is taken for it.
        Config: the settings; field descriptions are the documentation.
        defaults: settings that differ per backbone name or family, e.g. {"flux": {...}}.
        presets: named sets of settings.
        ablations: {row of a table: settings that differ from the default}.
        requires: capabilities a backbone must have (see `Capabilities.names`), e.g. {"velocity"}.
        slots: settings that name a registered component (or several) of the slot with the setting's name.
        curves: what each value that it logs means, by the name before any slash, for those who look at its training curves.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    requires: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[tuple[str, ...]] = ()
    curves: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: Any) -> None:
        """Keep the validated settings, an instance of `Config`."""
        self.config = config

    @property
    def seeded(self) -> bool:
        """Whether another seed gives another erasure at these settings.

        If not, a sweep runs the first of its seeds only, and runs of several seeds have one erasure in common.
        """
        return True

    def footprint(self, plan: Planned) -> Footprint:
        """What a training step holds at once, from which its memory is predicted.

        By default one row for each of the settings' `batch` and a LoRA for each concept, if the settings train at all.
        """
        config = self.config
        rows = getattr(config, "batch", 1) if getattr(config, "steps", 0) else 0
        return Footprint(rows=rows, trained_gb=LORA_GB * len(plan.concepts))

    def check(self, plan: Planned) -> None:
        """See that the settings make sense together, and with how images will be drawn; nothing is loaded for it.

        Raises:
            UsageError: they do not.
        """

    def texts(self, ctx: RunContext) -> list[str]:
        """All prompts that `erase` may encode once the denoiser is loaded: on most GPUs the text encoders are gone by then.

        Those that the concepts and the task give for training and for choosing settings, with their neutral forms. A
        method that makes prompts of its own adds them.
        """
        return training_texts(ctx)

    def erase(self, ctx: RunContext) -> Erasure:
        """Compute the erasure of `ctx.concepts` from `ctx.backbone`; leaves the backbone's own weights untouched."""
        raise NotImplementedError

    def erasure(
        self,
        ctx: RunContext,
        *,
        deltas: Mapping[str, Mapping[str, Deltas]] | None = None,
        guidance: Guidance | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> Erasure:
        """What `erase` ends with: the erasure of `ctx.concepts` by this method at its settings.

        Args:
            ctx: the run.
            deltas: {concept: {part: deltas of the base's weights}}; see `Erasure`.
            guidance: what steers sampling in place of changed weights.
            figures: the method's own numbers.

        Raises:
            ErasekitError: there are neither deltas nor guidance, or they are not what they should be; names the layer.
        """
        if guidance is None:
            check_deltas(self.name, deltas, ctx.backbone)
        settings = self.config.model_dump()
        made_by: dict[str, Any] = {"method": self.name, "config": settings}
        return Erasure.of(ctx.backbone, ctx.concepts, **made_by, deltas=deltas, guidance=guidance, figures=figures)
