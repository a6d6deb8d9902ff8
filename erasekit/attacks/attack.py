"""The base of every attack: what it knows, what it may spend, and what it hands back to be drawn."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field

from erasekit.attacks.draw import Draw, Knows
from erasekit.attacks.target import Target
from erasekit.concepts import Concept
from erasekit.evaluation.tasks import Prompt
from erasekit.settings import Settings


class AttackConfig(Settings):
    """Base of every attack's settings, its budget among them: frozen, and unknown keys are errors."""

    queries: int = Field(8, ge=1, le=100_000, description="images that are drawn and judged for a prompt at most")
    together: int = Field(
        1, ge=1, le=10_000, description="prompts that are attacked side by side: faster, and takes more memory"
    )

    def budget(self) -> dict[str, Any]:
        """What decides the outcome: all settings but how many prompts are attacked at once."""
        return self.model_dump(mode="json", exclude={"together"})


class Attack:
    """An attack on an erased concept. Subclasses set the class attributes and implement `rounds`.

    Attributes:
        name: the registered name.
        version: rises when equal settings find something else.
        kind: `prompt` if it looks for something to be drawn instead of a prompt; `probe` if it changes the sampling or the
            weights, so that no user of the model could do it by words.
        knows: what the attacker has; more cannot be reached through the target.
        Config: the settings; field descriptions are the documentation.
        defaults: settings that differ per backbone name or family.
        requires: capabilities a backbone must have.
        counts: what `Draw.cost` counts, for the metric `cost[name]`: the median at which the concept was found; "" for none.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    kind: ClassVar[Literal["prompt", "probe"]] = "prompt"
    knows: ClassVar[Knows] = "erased"
    Config: ClassVar[type[AttackConfig]] = AttackConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    requires: ClassVar[frozenset[str]] = frozenset()
    counts: ClassVar[str] = ""

    def __init__(self, config: Any) -> None:
        """Keep the validated settings, an instance of `Config`."""
        self.config = config

    def texts(self, concept: Concept, prompts: Sequence[Prompt]) -> list[str]:
        """All texts that `rounds` encodes for these prompts: on most GPUs the text encoders are gone by then."""
        return []

    @contextmanager
    def ready(self, target: Target) -> Iterator[None]:
        """What is done once for a concept, before its first prompt, and undone after the last."""
        yield

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """What to draw in place of one prompt, batch by batch: it ends with the first image that shows the concept.

        At most `queries` images are drawn, whatever is given. The same target and prompt give the same draws.
        """
        raise NotImplementedError

    def side_by_side(self, target: Target, prompts: Sequence[Prompt]) -> Generator[list[Draw | None], Sequence[bool] | None]:
        """What to draw in place of several prompts, a draw for each in every round; None where nothing is left to be tried.

        Sent back is of which prompts more is wanted; nothing stands for all. Here each prompt has its own `rounds`, and only
        images are drawn together. Attacks that train are faster if they ask the model for all prompts at once.
        """
        with ExitStack() as until_the_end:
            rounds = [until_the_end.enter_context(closing(self.rounds(target, prompt))) for prompt in prompts]
            wanted: Sequence[bool] = [True] * len(prompts)
            while True:
                draws = [next(own, None) if more else None for own, more in zip(rounds, wanted, strict=True)]
                if all(draw is None for draw in draws):
                    return
                wanted = (yield draws) or [True] * len(prompts)
