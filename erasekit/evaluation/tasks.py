"""What is measured: prompts with seeds, how images are drawn from them, and which evaluators look at them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from erasekit.concepts import Concept
from erasekit.errors import ErasekitError, UsageError, unknown
from erasekit.evaluation.metrics import measured
from erasekit.settings import Settings

Split = Literal["train", "validation", "evaluation"]
Sampler = Literal["default", "ddim", "dpm"]
SPLITS: tuple[Split, ...] = ("train", "validation", "evaluation")


class PromptSet(NamedTuple):
    """One of the sets that a task's prompts come in.

    Attributes:
        meaning: what its prompts ask for.
        drawn: whether its images are drawn and judged; the others are for training alone.
        needed: whether a task has to have it. A set that is empty leaves out the metrics that rest on it.
    """

    meaning: str
    drawn: bool = True
    needed: bool = False


PROMPT_SETS: dict[str, PromptSet] = {
    "erase": PromptSet("what is erased, by its name", needed=True),
    "synonyms": PromptSet("what is erased, in other words"),
    "preserve": PromptSet("what has to stay: things of the same kind"),
    "clean": PromptSet("anything else"),
    "pairs": PromptSet("two erased concepts at once"),
    "captions": PromptSet("all that the model can draw", drawn=False),
}
DRAWN = tuple(name for name, prompts in PROMPT_SETS.items() if prompts.drawn)


def seed_offset(which: str) -> int:
    """Where the seeds of a prompt set begin within its split: an image keeps its seed whatever else is drawn.

    Raises:
        UsageError: there is no such set; says the nearest.
    """
    if which not in PROMPT_SETS:
        raise unknown("prompt set", which, PROMPT_SETS, "docs/reference.md")
    return 100_000 * list(PROMPT_SETS).index(which)


class Prompt(NamedTuple):
    """One image to draw.

    Attributes:
        text: the prompt.
        seed: the seed of its noise.
        label: what the image should show (an evaluator's label); "" if nothing is checked.
        set: which prompt set it belongs to (see `PROMPT_SETS`).
        concept: the erased concept that this prompt asks for, "" if none.
        neutral: the same prompt without the concept, where the task knows it better than by replacing the concept's phrases
            (a prompt in other words, say); never needed for measuring.
        guidance: its own guidance scale, where it is not the protocol's.
        width: its own width in pixels.
        height: its own height in pixels.
    """

    text: str
    seed: int
    label: str = ""
    set: str = ""
    concept: str = ""
    neutral: str = ""
    guidance: float | None = None
    width: int | None = None
    height: int | None = None


class Protocol(Settings):
    """How images are drawn. Two numbers may stand in one column only if the hashes of their protocols agree."""

    sampler: Sampler = Field("ddim", description="the sampler: default (the pipeline's own), ddim, dpm")
    steps: int = Field(15, ge=1, le=1000, description="sampling steps")
    guidance: float = Field(4.0, ge=0, le=1000, description="classifier-free guidance scale")
    size: int = Field(64, ge=8, le=8192, description="side of the image in pixels")
    batch: int = Field(30, ge=1, le=10_000, description="images per batch")

    def hash(self, *parts: Any) -> str:
        """Eight hex digits over the protocol and everything else that decides a number (prompts, evaluators)."""
        text = json.dumps([self.model_dump(), *parts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


class Task:
    """A task: prompt sets, a protocol, evaluators, and how their scores become the task's metrics.

    Attributes:
        name: the registered name; `--task objects` means the task of that name in the backbone's domain.
        domain: the domain its prompts speak of.
        version: rises when any number it gives could change.
        title: one line for tables and reports; a stand-in says that it is one.
        concepts: the names it knows, each run on its own when no concept is given.
        evaluators: names of the evaluators that look at its images.
        evaluator_settings: {evaluator: settings of it}, where they are not its defaults; a user's go over them.
        metrics: the metrics that are made of what they see (see `metrics.MEASURES`); `acc_e[clip10]` is by the judge `clip10`.
        protocol: how its images are drawn.
    """

    name: ClassVar[str]
    domain: ClassVar[Literal["natural", "mini"]]
    version: ClassVar[int] = 1
    title: ClassVar[str] = ""
    concepts: ClassVar[tuple[str, ...]] = ()
    evaluators: ClassVar[tuple[str, ...]] = ()
    evaluator_settings: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    metrics: ClassVar[tuple[str, ...]] = ()
    protocol: ClassVar[Protocol] = Protocol()
    control: ClassVar[str] = ""  # a task of its domain whose concept no model has learned: what attacks find there is no find
    digest: str = ""  # over the content of a task that a file declares
    blurred: ClassVar[bool] = False  # images are blurred in reports unless --reveal; those of sexual prompts always are

    @property
    def labels(self) -> tuple[str, ...]:
        """What its images can be asked to show: evaluators that tell names apart (a setting `labels`) are given these."""
        return self.concepts

    def packages(self) -> Mapping[str, str]:
        """{module that reading its prompts takes and erasekit does not need: what pip installs for it}."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What the protocol says of the task besides its prompts: which profile of it, which lists the prompts came from."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers has to know of the prompts, one line each."""
        return ()

    def concept(self, text: str) -> Concept:
        """Complete what a user wrote (`cat`, `cat:kitty,kitten`) to a concept of this task.

        Raises:
            UsageError: the task does not know the name.
        """
        raise NotImplementedError

    def prompts(self, which: str, concepts: Sequence[Concept], split: Split, limit: int | None = None) -> list[Prompt]:
        """One prompt set of one split (see `PROMPT_SETS`); only `erase` may not be empty.

        Prompts and seeds of the three splits are disjoint. `limit` is the most per set and concept.
        """
        raise NotImplementedError

    def aggregate(self, rows: Mapping[str, Any], concepts: Sequence[Concept]) -> dict[str, Any]:
        """The task's metrics from the scored images of both sides; by default those that `metrics` names."""
        return measured(self.metrics, rows, [c.name for c in concepts])

    def images(self, prompts: Sequence[Prompt]) -> Any:
        """Images (n, 3, h, w), uint8, of what prompts ask for, where no model draws it; None if the models do."""
        return None


PROMPTS_OWED = "It is asked for prompts(which, concepts, split, limit); a set that there is not is empty, []."


def asked(task: Task, which: str, concepts: Sequence[Concept], split: Split, limit: int | None = None) -> list[Prompt]:
    """A task's `prompts`, whoever wrote them.

    Raises:
        UsageError: the task fails, or gives something else than prompts; says for which set.
    """
    try:
        prompts = task.prompts(which, concepts, split, limit)
    except ErasekitError:
        raise
    except Exception as error:
        line = f"The task '{task.name}' fails in prompts('{which}', ..., '{split}'): {type(error).__name__}: {error}"
        raise UsageError(f"{line}. {PROMPTS_OWED}") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, Prompt) for prompt in prompts):
        line = f"The task '{task.name}' gives no list of erasekit.Prompt for prompts('{which}', ..., '{split}')"
        raise UsageError(f"{line}. {PROMPTS_OWED}")
    if other := next((prompt for prompt in prompts if prompt.set != which), None):
        raise UsageError(
            f"The task '{task.name}' gives '{other.text}' of the set '{other.set}' for prompts('{which}', ...). Name that set."
        )
    return prompts
