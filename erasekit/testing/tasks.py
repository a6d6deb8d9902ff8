"""What every task owes: prompt sets in three disjoint splits, evaluators that exist, and metrics of what they see."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erasekit.concepts import Concept
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation.declared import Declared
from erasekit.evaluation.evaluate import evaluate
from erasekit.evaluation.evaluators import Batch, Evaluator, Scores
from erasekit.evaluation.finding import find_task
from erasekit.evaluation.judgement import Judgement
from erasekit.evaluation.metrics import measure_of, split
from erasekit.evaluation.sampling import SAMPLERS
from erasekit.evaluation.tasks import DRAWN, PROMPT_SETS, SPLITS, Prompt, Protocol, Split, Task, asked
from erasekit.registration.plugins import Registries
from erasekit.safety import is_unsafe
from erasekit.testing.worlds import Plugins, owe, owe_none, with_world

Judges = list[tuple[type[Evaluator], dict[str, Any]]]
MOST = 2  # prompts per set and concept whose images are judged


def check_task(name: str, *, concepts: Sequence[str] = (), evaluators: bool = True, plugin: Plugins = ()) -> None:
    """See that a task keeps its contract; its metrics are made from images of noise.

    Args:
        name: the registered name, "domain/name", or the path of a TOML file.
        concepts: what is erased; left out, the first two that the task declares, or "a dog".
        evaluators: whether the task's evaluators judge the images; otherwise no weights are needed, and the task gets rows of
            a judge that sees every label. That judge stands in too where an evaluator lacks weights or images.
        plugin: the file of a task that is not installed.

    Raises:
        AssertionError: something is broken; says what.
        UsageError: the task does not know a concept.
        EnvironmentProblem: its prompts cannot be had.
    """
    registries = with_world(plugin)
    task = _found(name, registries)
    what = f"'{name}'"
    owe(isinstance(task, Task), f"{what} is no subclass of erasekit.Task.")
    owe(task.domain in ("natural", "mini"), f"{what}: its domain is '{task.domain}'. It is 'natural' or 'mini'.")
    owe(isinstance(task.protocol, Protocol), f"{what}: its protocol is no erasekit.Protocol.")
    owe(task.protocol.sampler in SAMPLERS, f"{what}: unknown sampler '{task.protocol.sampler}'; {', '.join(SAMPLERS)}.")
    for metric in task.metrics:
        measure_of(split(metric)[0])
    known = [task.concept(text) for text in concepts or task.concepts[:2] or ("a dog",)]
    owe_none([c for c in known if not isinstance(c, Concept)], f"{what}: concept() gives {{}}, which is no erasekit.Concept.")
    check_unknown_concept(what, task)
    drawn = check_prompts(what, task, known)
    check_metrics(what, task, known, drawn, _evaluators(task, registries) if evaluators else None)


def _found(name: str, registries: Registries) -> Task:
    """The task of a registered name, or of a file, whatever domain it is of."""
    if name.endswith(".toml"):
        return Declared(Path(name))
    domain, _, short = name.partition("/")
    return find_task(short, domain, registries)


def check_unknown_concept(what: str, task: Task) -> None:
    """A name that the task does not know is taken, or answered by a line."""
    try:
        task.concept("no such thing")
    except UsageError as error:
        owe("no such thing" in str(error), f"{what}: the error for an unknown concept does not name it: {error}")
    except Exception as error:
        raise AssertionError(f"{what}: concept('no such thing') raises {error!r}. Raise a UsageError that names it.") from error


def check_prompts(what: str, task: Task, concepts: Sequence[Concept]) -> list[Prompt]:
    """Every set of every split is what it says, the same each time, and shares nothing with other splits."""
    names, drawn = [c.name for c in concepts], []
    seeds: dict[int, Split] = {}
    for split_ in SPLITS:
        for which in PROMPT_SETS:
            prompts = _prompts(task, which, concepts, split_)
            owe(prompts == _prompts(task, which, concepts, split_), f"{what}: '{which}' is another set the second time.")
            few = _prompts(task, which, concepts, split_, 1)
            owe(len(few) <= max(1, len(names)), f"{what}: with limit=1, '{which}' of '{split_}' has {len(few)} prompts.")
            for prompt in prompts:
                check_prompt(f"{what}, '{which}' of '{split_}'", prompt, which, names)
                taken = seeds.setdefault(prompt.seed, split_)
                owe(taken == split_, f"{what}: seed {prompt.seed} is in '{taken}' and in '{split_}'. Splits share no seeds.")
            if split_ == "evaluation" and which in DRAWN:
                drawn += _prompts(task, which, concepts, split_, MOST)
    missing = {name for name, prompts in PROMPT_SETS.items() if prompts.needed} - {p.set for p in drawn}
    owe_none(sorted(missing), f"{what}: there are no prompts in the set '{{}}' of the evaluation split.")
    return drawn


def _prompts(task: Task, which: str, concepts: Sequence[Concept], split_: Split, limit: int | None = None) -> list[Prompt]:
    try:
        return asked(task, which, concepts, split_, limit)
    except UsageError as error:
        raise AssertionError(str(error)) from error


def check_prompt(what: str, prompt: Any, which: str, names: Sequence[str]) -> None:
    """One prompt."""
    owe(isinstance(prompt, Prompt), f"{what}: {prompt!r} is no erasekit.Prompt.")
    owe(prompt.text.strip(), f"{what}: there is an empty prompt.")
    owe(not is_unsafe(prompt.text), f"{what}: a prompt pairs minors with sexual terms. Remove it.")
    owe(isinstance(prompt.seed, int) and prompt.seed >= 0, f"{what}: the seed of '{prompt.text}' is {prompt.seed!r}.")
    owe(prompt.set == which, f"{what}: '{prompt.text}' says that it is of the set '{prompt.set}'.")
    named = [name for name in prompt.concept.split("+") if name]
    owe(set(named) <= set(names), f"{what}: '{prompt.text}' asks for '{prompt.concept}', none of {', '.join(names)}.")
    wants = which in ("erase", "synonyms", "pairs")
    owe(bool(named) == wants, f"{what}: '{prompt.text}' names {prompt.concept or 'nothing'!r} as the concept that it asks for.")


def check_metrics(what: str, task: Task, concepts: Sequence[Concept], drawn: Sequence[Prompt], judges: Judges | None) -> None:
    """The task's metrics, with all its prompt sets and with no more than it has to have."""
    needed = [p for p in drawn if PROMPT_SETS[p.set].needed]
    if judges is None:
        judges = [(type("Agrees", (Agrees,), {"name": name}), {}) for name in task.evaluators]
    for prompts in (drawn, needed):
        sets = ", ".join(dict.fromkeys(p.set for p in prompts))
        try:
            _measured(task, judges, prompts, concepts)
        except Exception as error:
            raise AssertionError(f"{what}, of images of the sets {sets}: {error}") from error


def _evaluators(task: Task, registries: Registries) -> Judges | None:
    """The task's evaluators with their settings; None if one lacks weights, or images that a user gives."""
    found = []
    for name in task.evaluators:
        kind = registries.evaluators.get(name)
        names = {"labels": task.labels} if "labels" in kind.Config.model_fields else {}
        found.append((kind, names | dict(task.evaluator_settings.get(name, {}))))
    try:
        for kind, values in found:
            kind(**values)
    except (EnvironmentProblem, UsageError):
        return None
    return found


def _measured(task: Task, judges: Judges, prompts: Sequence[Prompt], concepts: Sequence[Concept]) -> None:
    """Make metrics of images of noise, as a run does."""
    evaluators = [kind(**values) for kind, values in judges]
    noise = np.random.default_rng(0).integers(256, size=(2 * len(prompts), 64, 64, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.png" for i in range(len(noise))]
        for path, pixels in zip(paths, noise, strict=True):
            Image.fromarray(pixels).save(path)
        evaluate(task, evaluators, prompts, paths[: len(prompts)], paths[len(prompts) :], concepts=concepts)


class Agrees(Evaluator):
    """A judge that sees every label."""

    name = "agrees"

    def __init__(self) -> None:
        """Start with no images."""
        self._rows: list[dict[str, Any]] = []

    def update(self, batch: Batch) -> None:
        """See what each prompt asks for."""
        self._rows += [Judgement(seen=p.label.split("+"), shown=True, score=0.9).model_dump() for p in batch.prompts]

    def compute(self) -> Scores:
        """A row per image."""
        return Scores(self._rows)
