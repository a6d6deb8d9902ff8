"""Merging: the erased model is averaged with the unedited one, as people merge models."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from pydantic import Field

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import ERASURE, Target
from erasekit.erasures.deltas import scale
from erasekit.evaluation.tasks import Prompt


class MergingConfig(AttackConfig):
    """Settings."""

    queries: int = Field(1, ge=1, description="images that are drawn and judged for a prompt at most; there is one")
    share: float = Field(0.5, ge=0, le=1, description="share of the erased model")


class Merging(Attack):
    """Weights between the two models: what of the erasure a merge leaves. An erasure without weights has nothing to merge."""

    name = "merging"
    kind = "probe"
    Config = MergingConfig
    config: MergingConfig

    @contextmanager
    def ready(self, target: Target) -> Iterator[None]:
        """Put a share of the erasure on."""
        erasure = target.erasure
        if erasure is not None and erasure.kind == "weights":
            target.bank.remove()
            target.bank.add_frozen(ERASURE, scale(erasure.total(), self.config.share))
        yield

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """The prompt."""
        yield target.draw([prompt.text], [prompt.seed])
