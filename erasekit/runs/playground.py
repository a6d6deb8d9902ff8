"""One model with and without erasures, drawn from as prompts come: what `erasekit play` shows."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image

from erasekit.backbones.protocol import Backbone
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into
from erasekit.errors import UsageError
from erasekit.evaluation.finding import find_task
from erasekit.evaluation.sampling import generate
from erasekit.evaluation.tasks import Protocol
from erasekit.registration.plugins import Registries, default
from erasekit.runs.config import settings_of
from erasekit.runs.pages.images import blurred
from erasekit.runs.resolve import DEFAULT_TASKS
from erasekit.safety import is_sexual, reject_unsafe

KEPT = 64  # images that are not drawn twice: what moves one slider draws one image
WHOLE = "all concepts"  # what the strength of an erasure is called that has no parts


class Drawn(NamedTuple):
    """An image, and how long it took."""

    image: Image
    seconds: float
    blurred: bool


@dataclass
class Side:
    """An erasure that is loaded.

    Attributes:
        title: whose it is and what it erases.
        names: the concepts that have a strength of their own.
        adapters: the adapter of each; none of an erasure that steers.
    """

    folder: Path
    erasure: Erasure
    title: str
    names: tuple[str, ...]
    adapters: Mapping[str, str]


class Playground:
    """A base and erasures of it in one pipeline: adapters and hooks are switched between images, nothing is loaded twice."""

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        backbone: Mapping[str, Any] | None = None,
        protocol: Mapping[str, Any] | None = None,
        reveal: bool = False,
        registries: Registries | None = None,
    ) -> None:
        """Load the base and the erasures.

        Args:
            folders: erasures of one backbone.
            backbone: its settings.
            protocol: how images are drawn, where not as usual.
            reveal: do not blur images of sexual prompts, nor those of bases from which such things are erased.
            registries: what names stand for; what is installed, if left out.

        Raises:
            UsageError: a folder holds no erasure, or one of another base.
            EnvironmentProblem: the base cannot be had.
        """
        self._registries, self._reveal, self._lock = registries or default(), reveal, threading.Lock()
        erasures = [Erasure.load(folder) for folder in folders]
        kind = self._registries.backbones.get(erasures[0].backbone)
        erased = [concept for erasure in erasures for concept in erasure.concepts]
        self._explicit = kind.domain == "natural" and any(c.kind == "nsfw" for c in erased)  # whatever the prompt says
        self.protocol = usual_protocol(kind, protocol or {}, self._registries)
        self.backbone: Backbone = kind.load(settings_of(kind.Config, backbone or {}, "backbone."))
        getattr(self.backbone, "keep_encoders", lambda: None)()  # prompts go on coming
        self.backbone.encode([""])
        self._pipe = self.backbone.pipeline(encoders=False, shared=True)
        self._kept = lru_cache(KEPT)(self._draw)
        self.sides = [self._load(folder) for folder in folders]
        self._switch({})

    def draw(self, prompt: str, seed: int, side: int | None = None, strength: Mapping[str, float] | None = None) -> Drawn:
        """One image: by the base, or by an erasure with a strength for each of its concepts (1, if not named).

        Raises:
            UsageError: the prompt is empty or one that erasekit refuses.
        """
        if not prompt.strip():
            raise UsageError("There is no prompt. Type what is to be drawn.")
        reject_unsafe([prompt])
        with self._lock:
            return self._kept(prompt, seed, side, tuple(sorted((strength or {}).items())))

    def _draw(self, prompt: str, seed: int, side: int | None, strength: tuple[tuple[str, float], ...]) -> Drawn:
        from erasekit.erasures.hooks import detach

        begin = time.monotonic()
        self.backbone.encode([prompt])
        try:
            self._use(None if side is None else self.sides[side], dict(strength))
            (image,) = generate(self.backbone, self._pipe, [prompt], [seed], self.protocol)
        finally:
            detach(self._pipe)
        hidden = not self._reveal and (self._explicit or is_sexual([prompt]))
        return Drawn(blurred(image) if hidden else image, time.monotonic() - begin, hidden)

    def _load(self, folder: Path) -> Side:
        erasure = Erasure.load(folder, self.backbone)
        title = f"{erasure.method}: {', '.join(c.name for c in erasure.concepts)}"
        if erasure.guidance is not None:
            return Side(folder, erasure, title, (WHOLE,), {})
        names = tuple(erasure.deltas)
        adapters = load_into(self._pipe, folder, names, base=self.backbone)
        return Side(folder, erasure, title, names, dict(zip(names, adapters, strict=True)))

    def _use(self, side: Side | None, strength: Mapping[str, float]) -> None:
        """Make the pipeline the base, or the base with one erasure."""
        if side is None:
            self._switch({})
        elif side.adapters:
            self._switch({adapter: strength.get(name, 1.0) for name, adapter in side.adapters.items()})
        else:
            self._switch({})
            component = self._registries.components.get
            load_into(self._pipe, side.folder, strength=strength.get(WHOLE, 1.0), base=self.backbone, component=component)

    def _switch(self, weights: Mapping[str, float]) -> None:
        """Activate these adapters of the pipeline and no others; what is at 0 is off."""
        active = {name: weight for name, weight in weights.items() if weight}
        if not any(side.adapters for side in getattr(self, "sides", ())):
            return
        if active:
            self._pipe.enable_lora()
            self._pipe.set_adapters(list(active), list(active.values()))
        else:
            self._pipe.disable_lora()


def usual_protocol(kind: Any, settings: Mapping[str, Any], registries: Registries) -> Protocol:
    """How images of a backbone are drawn: as the default task of its domain does.

    Raises:
        UsageError: a setting is wrong.
    """
    usual = find_task(DEFAULT_TASKS[kind.domain], kind.domain, registries).protocol
    protocol: Protocol = settings_of(Protocol, usual.model_dump() | dict(kind.sampling) | dict(settings), "protocol.")
    return protocol
