"""What every task owes: prompt sets in three disjoint splits, evaluators that exist, and metrics of what they see."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erasekit.concepts import Concept
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation.evaluate import evaluate
from erasekit.evaluation.evaluators import Evaluator
from erasekit.evaluation.judgement import Judgement
from erasekit.evaluation.metrics import measure_of, split
from erasekit.evaluation.results import Metric
from erasekit.evaluation.sampling import SAMPLERS
from erasekit.evaluation.tasks import DRAWN, PROMPT_SETS, SPLITS, Prompt, Protocol, Split, Task
from erasekit.registration.plugins import Registries
from erasekit.safety import is_unsafe
from erasekit.testing.worlds import Plugins, owe, owe_none, with_world

MOST = 2  # prompts per set and concept whose images are judged


def check_task(name: str, *, concepts: Sequence[str] = (), plugin: Plugins = ()) -> None:
    """See that a task keeps its contract; its metrics are made from images of noise.

    Args:
        name: the registered name, "domain/name".
        concepts: what is erased; left out, the first two that the task declares, or "a dog".
        plugin: the file of a task that is not installed.

    Raises:
        AssertionError: something is broken; says what.
        UsageError: the task does not know a concept.
    """
    registries = with_world(plugin)
    domain, _, short = name.partition("/")
    found = registries.tasks.get(short, domain)
    task: Task = found() if isinstance(found, type) else found
    what = f"'{name}'"
    owe(domain in ("natural", "mini"), f"{what}: its domain is '{domain}'. It is 'natural' or 'mini'.")
    owe(isinstance(task.protocol, Protocol), f"{what}: its protocol is no erasekit.Protocol.")
    owe(task.protocol.sampler in SAMPLERS, f"{what}: unknown sampler '{task.protocol.sampler}'; {', '.join(SAMPLERS)}.")
    for metric in task.metrics:
        measure_of(split(metric)[0])
    asked = [task.concept(text) for text in concepts or task.concepts[:2] or ("a dog",)]
    owe_none([c for c in asked if not isinstance(c, Concept)], f"{what}: concept() gives {{}}, which is no erasekit.Concept.")
    check_unknown_concept(what, task)
    drawn = check_prompts(what, task, asked)
    check_metrics(what, task, asked, drawn, registries)


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
            prompts = _prompts(what, task, which, concepts, split_)
            owe(prompts == _prompts(what, task, which, concepts, split_), f"{what}: '{which}' is another set the second time.")
            few = _prompts(what, task, which, concepts, split_, 1)
            owe(len(few) <= max(1, len(names)), f"{what}: with limit=1, '{which}' of '{split_}' has {len(few)} prompts.")
            for prompt in prompts:
                check_prompt(f"{what}, '{which}' of '{split_}'", prompt, which, names)
                taken = seeds.setdefault(prompt.seed, split_)
                owe(taken == split_, f"{what}: seed {prompt.seed} is in '{taken}' and in '{split_}'. Splits share no seeds.")
            if split_ == "evaluation" and which in DRAWN:
                drawn += _prompts(what, task, which, concepts, split_, MOST)
    missing = {name for name, prompts in PROMPT_SETS.items() if prompts.needed} - {p.set for p in drawn}
    owe_none(sorted(missing), f"{what}: there are no prompts in the set '{{}}' of the evaluation split.")
    return drawn


def _prompts(
    what: str, task: Task, which: str, concepts: Sequence[Concept], split_: Split, limit: int | None = None
) -> list[Prompt]:
    try:
        prompts = task.prompts(which, concepts, split_, limit)
    except Exception as error:
        line = f"{what}: prompts('{which}', ..., '{split_}') raises {error!r}. A set that there is not is empty: return []."
        raise AssertionError(line) from error
    owe(isinstance(prompts, list), f"{what}: prompts('{which}', ...) gives a {type(prompts).__name__}, not a list.")
    return prompts


def check_prompt(what: str, prompt: Any, which: str, names: Sequence[str]) -> None:
    """One prompt."""
    owe(isinstance(prompt, Prompt), f"{what}: {prompt!r} is no erasekit.Prompt.")
    owe(prompt.text.strip(), f"{what}: there is an empty prompt.")
    owe(not is_unsafe(prompt.text), f"{what}: a prompt pairs minors with sexual terms. Remove it.")
    owe(isinstance(prompt.seed, int) and prompt.seed >= 0, f"{what}: the seed of '{prompt.text}' is {prompt.seed!r}.")
    owe(prompt.set == which, f"{what}: '{prompt.text}' says that it is of the set '{prompt.set}'.")
    asked = [name for name in prompt.concept.split("+") if name]
    owe(set(asked) <= set(names), f"{what}: '{prompt.text}' asks for '{prompt.concept}', none of {', '.join(names)}.")
    wants = which in ("erase", "synonyms", "pairs")
    owe(bool(asked) == wants, f"{what}: '{prompt.text}' names {prompt.concept or 'nothing'!r} as the concept that it asks for.")


def check_metrics(what: str, task: Task, concepts: Sequence[Concept], drawn: Sequence[Prompt], registries: Registries) -> None:
    """The task's metrics, with all its prompt sets and with no more than it has to have."""
    needed = [p for p in drawn if PROMPT_SETS[p.set].needed]
    evaluators = _evaluators(task, registries)
    for prompts in (drawn, needed):
        sets = ", ".join(dict.fromkeys(p.set for p in prompts))
        try:
            measured = (
                _judged(task, prompts, concepts) if evaluators is None else _measured(task, evaluators, prompts, concepts)
            )
        except Exception as error:
            raise AssertionError(f"{what}: its metrics, of images of the sets {sets}, fail: {error!r}") from error
        wrong = [name for name, metric in measured.items() if not isinstance(metric, Metric)]
        owe_none(wrong, f"{what}: the metric '{{}}' is no erasekit.evaluation.results.Metric.")


def _evaluators(task: Task, registries: Registries) -> list[type[Evaluator]] | None:
    """The task's evaluators; None if the weights of one cannot be had here."""
    kinds = [registries.evaluators.get(name) for name in task.evaluators]
    try:
        for kind in kinds:
            kind(**task.evaluator_settings.get(kind.name, {}))
    except EnvironmentProblem:
        return None
    return kinds


def _measured(
    task: Task, kinds: Sequence[type[Evaluator]], prompts: Sequence[Prompt], concepts: Sequence[Concept]
) -> Mapping[str, Any]:
    """The metrics of images of noise, as a run measures them."""
    evaluators = [kind(**task.evaluator_settings.get(kind.name, {})) for kind in kinds]
    noise = np.random.default_rng(0).integers(256, size=(2 * len(prompts), 64, 64, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.png" for i in range(len(noise))]
        for path, pixels in zip(paths, noise, strict=True):
            Image.fromarray(pixels).save(path)
        sides = paths[: len(prompts)], paths[len(prompts) :]
        return evaluate(task, evaluators, prompts, *sides, concepts=concepts).metrics


def _judged(task: Task, prompts: Sequence[Prompt], concepts: Sequence[Concept]) -> Mapping[str, Any]:
    """The metrics of what a judge says that sees every label."""
    rows = [{"prompt": p.text, "seed": p.seed, "set": p.set, "label": p.label, "concept": p.concept} for p in prompts]
    judge = {"judge": next(iter(task.evaluators), "")}
    seen = [Judgement(seen=p.label.split("+"), shown=True, score=0.9).model_dump() for p in prompts]
    both = {side: [row | found | judge for row, found in zip(rows, seen, strict=True)] for side in ("base", "erased")}
    metrics: Mapping[str, Any] = task.aggregate(both, concepts)
    return metrics
