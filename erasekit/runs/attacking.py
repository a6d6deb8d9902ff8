"""Attacks on the erasure of a run: on the erased model, on the unedited one, and on a concept that no model has learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from erasekit.atomic import one_by_one, replacing
from erasekit.attacks.attack import Attack
from erasekit.attacks.campaign import Campaign, plain
from erasekit.attacks.draw import Draw
from erasekit.attacks.drawing import latents
from erasekit.attacks.judge import Judge
from erasekit.attacks.outcomes import ANY, MEANINGS, NONE, Outcome, digest, either, median_cost, share, spent
from erasekit.attacks.target import ErasedModel
from erasekit.backbones.protocol import Backbone
from erasekit.erasures.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.evaluation.evaluators import Evaluator
from erasekit.evaluation.metrics import split
from erasekit.evaluation.results import Metric
from erasekit.evaluation.sampling import base_key
from erasekit.evaluation.tasks import Prompt
from erasekit.events import progress
from erasekit.methods.context import RunContext
from erasekit.registration.plugins import Registries
from erasekit.runs.compute import context
from erasekit.runs.plan import Plan
from erasekit.runs.rundir import write_json
from erasekit.safety import reject_unsafe

FOLDER = "attacks"  # in the run directory, and in the cache
SUMMARY = "attacks.json"
NEVER, CHANCE = "false_alarm", "chance"
BLIND = ("nothing", "text encoder")  # what attacks have that do not look at the model: they draw what may show anything


@dataclass(frozen=True)
class Stage:
    """What the attacks of a run need.

    Attributes:
        rows: the scores of both sides (see `Evaluation.rows`): what the plain prompts show.
        folder: the run directory.
        cache: where what does not depend on the erasure is kept for other runs.
    """

    plan: Plan
    registries: Registries
    backbone: Backbone
    evaluators: Sequence[Evaluator]
    prompts: Sequence[Prompt]
    rows: Sequence[Mapping[str, Any]]
    folder: Path
    cache: Path

    def run(self) -> dict[str, Metric]:
        """Try every attack on the unedited model, on a concept that it never learned, and on the erased model."""
        plan, before = self.plan, self._unedited()
        with self._model(Erasure.load(self.folder / "erasure", self.backbone)) as model:
            campaign = self._campaign(model, "erased", before.examples, self.folder / FOLDER)
            erased = {name: campaign.run(name, attack(config)) for name, attack, config in plan.attacks}
        outcomes = {NONE: self._plain_outcomes("erased"), **erased}
        never, chance = self._controls()
        write_json(self.folder / SUMMARY, self._summary(outcomes, never))
        unedited = {NONE: self._plain_outcomes("base"), **before.outcomes}
        return metrics(plan, replace(before, outcomes=outcomes, judge=self._judge()), unedited, never, chance)

    def _unedited(self) -> Found:
        """What attacks find on the unedited model, and its images of the concepts."""
        folder = self.cache / FOLDER / base_key(self.backbone, self.plan.protocol, self.prompts)
        with self._model(None) as model:
            examples, outcomes = self._examples(model, folder), {}
            for name, attack, config in self.plan.attacks:
                place = folder / self._key(name, attack, config, self.plan.task)
                outcomes[name] = self._campaign(model, "base", examples, place).run(name, attack(config))
        return Found(outcomes, examples)

    def _controls(self) -> tuple[Found, Found]:
        """What attacks find of a concept that no model has learned, and of the erased ones in images that do not ask for them.

        Nothing if the task knows no such concept. Runs that work at once share these: what another one is at comes last.
        """
        control = control_of(self.plan, self.registries)
        if control is None:
            return Found({}, {}), Found({}, {})
        task, attacks = control.task, {name: (attack, config) for name, attack, config in self.plan.attacks}
        judge = Judge(task.name, [self.registries.evaluators.get(name)() for name in task.evaluators])
        found: dict[tuple[str, str], list[Outcome]] = {(kind, name): [] for kind in (NEVER, CHANCE) for name in attacks}
        with _closing(ErasedModel(replace(self._context(), task=task, concepts=control.concepts), None)) as model:
            jobs = list(self._jobs(model, control, judge))
            for k in one_by_one([campaign.folder for _, _, campaign in jobs]):
                kind, name, campaign = jobs[k]
                attack, config = attacks[name]
                shown = [outcome.shown for outcome in plain(campaign, self.plan.protocol.batch)]
                found[kind, name] += replace(campaign, plain=shown).run(name, attack(config))
        never, chance = ({n: of for (kind, n), of in found.items() if kind == which and of} for which in (NEVER, CHANCE))
        return Found(never, {}, judge.tag), Found(chance, {}, self._judge())

    def _jobs(self, model: ErasedModel, control: Control, judge: Judge) -> Iterator[tuple[str, str, Campaign]]:
        """(`NEVER` or `CHANCE`, attack, campaign): each attack on the control, judged for it and for each erased concept.

        The latter only for attacks that do not look at the model, whose find may be no more than one image of many; for
        the others it would be another attack, on another concept.
        """
        folder = self.cache / FOLDER / base_key(self.backbone, self.plan.protocol, control.prompts)
        x0 = self.backbone.to_latents(control.task.images(control.prompts).float() / 127.5 - 1).cpu()
        whole = Campaign(model, control.prompts, [], {i: x0[[i]] for i in range(len(x0))}, judge, folder, told=_told)
        for name, attack, config in self.plan.attacks:
            yield NEVER, name, replace(whole, folder=folder / self._key(name, attack, config, control.task))
            for concept in self.plan.concepts if attack.knows in BLIND else ():
                labels = [p.label for p in self.prompts if p.concept == concept.name]
                asked = [p._replace(label=label) for p, label in zip(control.prompts, labels, strict=True)]
                place = folder / self._key(name, attack, config, self.plan.task, concept.name)
                yield CHANCE, name, replace(whole, prompts=asked, judge=self._own_judge(), folder=place)

    def _examples(self, model: ErasedModel, folder: Path) -> dict[int, torch.Tensor]:
        """Latents (1, ...) of the unedited model's images that show their concept, by the index of their prompt."""
        shown, path = self._plain("base"), folder / "examples.safetensors"
        try:
            x0 = load_file(path)["x0"]
        except (OSError, SafetensorError, KeyError):
            encoded, parts = self.backbone.encode([p.text for p in self.prompts]), []
            for rows in torch.arange(len(self.prompts)).split(self.plan.protocol.batch):
                seeds = [self.prompts[i].seed for i in rows.tolist()]
                parts.append(latents(model, Draw(encoded[rows], seeds)).cpu())
            x0 = torch.cat(parts)
            with replacing(path) as temporary:
                save_file({"x0": x0}, temporary)
        return {i: x0[[i]] for i in range(len(x0)) if shown[i]}

    def _model(self, erasure: Erasure | None) -> AbstractContextManager[ErasedModel]:
        return _closing(ErasedModel(self._context(), erasure))

    def _context(self) -> RunContext:
        return context(self.plan, self.backbone, self.registries)

    def _campaign(self, model: ErasedModel, side: str, examples: Mapping[int, torch.Tensor], folder: Path) -> Campaign:
        keep = self.plan.config.keep_texts and side == "erased"
        return Campaign(model, self.prompts, self._plain(side), examples, self._own_judge(), folder, keep, _told)

    def _own_judge(self) -> Judge:
        return Judge(self.plan.task.name, self.evaluators)

    def _plain(self, side: str) -> list[bool | None]:
        """Whether the images of the prompts show their concept, as the run's evaluators have said.

        Raises:
            UsageError: they say nothing of single images.
        """
        own = {row["index"]: row for row in self.rows if row["side"] == side and row["set"] == "erase"}
        shown = [None if row["failed"] else row.get("shown") for _, row in sorted(own.items())]
        if all(value is None for value in shown):
            raise UsageError(
                f"Nothing judges single images in the task '{self.plan.task.name}' (no evaluator gives 'shown'), so there is "
                f"nothing to attack. Leave --attack out, or choose another task."
            )
        return shown

    def _judge(self) -> str:
        """`name@version` of who judged the plain prompts, and judges attacks too."""
        tags = {evaluator.name: evaluator.tag for evaluator in self.evaluators}
        named = dict.fromkeys(row["judge"] for row in self.rows if row["set"] == "erase" and row.get("judge"))
        return ", ".join(tags.get(name, name) for name in named)

    def _plain_outcomes(self, side: str) -> list[Outcome]:
        keys = [digest(prompt.text, prompt.seed) for prompt in self.prompts]
        plain = zip(keys, self._plain(side), strict=True)
        return [Outcome(index=i, prompt=key, shown=shown, queries=1) for i, (key, shown) in enumerate(plain)]

    def _key(self, name: str, attack: type[Attack], config: Any, task: Any, *more: str) -> str:
        """Eight hex digits over an attack with its budget, the task that judges, the seed, and more."""
        judges = [self.registries.evaluators.get(name)().describe() for name in task.evaluators]
        parts = (name, attack.version, config.budget(), task.name, task.version, judges, self.plan.config.seed)
        return self.plan.protocol.hash(*parts, *more)

    def _summary(self, outcomes: Mapping[str, Sequence[Outcome]], never: Found) -> dict[str, Any]:
        """What attacks.json holds: of each attack what it knows, its budget, and what it took."""
        cost = spent(outcomes)
        rows = {
            name: {"kind": attack.kind, "knows": attack.knows, "settings": config.budget(), "spent": cost[name]}
            for name, attack, config in self.plan.attacks
        }
        return {
            "schema_version": 1,
            "prompts": len(self.prompts),
            "controls": len(next(iter(never.outcomes.values()), [])),
            "attacks": rows,
        }


@dataclass(frozen=True)
class Found:
    """What attacks have found on one model.

    Attributes:
        outcomes: of each attack.
        examples: latents (1, ...) of images of the concepts by the index of their prompt.
        judge: who judged.
    """

    outcomes: dict[str, list[Outcome]]
    examples: dict[int, torch.Tensor]
    judge: str = ""


@dataclass(frozen=True)
class Control:
    """A concept that no model has learned: its task, itself, and prompts that ask for it."""

    task: Any
    concepts: tuple[Any, ...]
    prompts: list[Prompt]


def control_of(plan: Plan, registries: Registries) -> Control | None:
    """The control of a plan's task, with as many prompts as one concept of the plan has; None if the task names none."""
    if not plan.attacks or not plan.task.control:
        return None
    task = registries.tasks.get(plan.task.control, plan.task.domain)()
    concept = task.concept(task.concepts[0])
    per_concept = len(attacked_prompts(plan)) // len(plan.concepts)
    return Control(task, (concept,), task.prompts("erase", [concept], "evaluation", per_concept))


def attacked_prompts(plan: Plan) -> list[Prompt]:
    """The evaluation prompts that name the concepts."""
    return plan.task.prompts("erase", plan.concepts, "evaluation", plan.config.limit)


def attack_texts(plan: Plan, registries: Registries) -> list[str]:
    """All texts that the attacks and their control will encode.

    Raises:
        UsageError: a prompt is one that erasekit refuses to draw.
    """
    if not plan.attacks:
        return []
    control = control_of(plan, registries)
    sides = [(plan.concepts, attacked_prompts(plan)), *([(control.concepts, control.prompts)] if control else [])]
    found: list[str] = []
    for concepts, prompts in sides:
        reject_unsafe(p.text for p in prompts)
        found += [p.text for p in prompts]
        for concept in concepts:
            own = [p for p in prompts if p.concept == concept.name]
            found += [text for _, attack, config in plan.attacks for text in attack(config).texts(concept, own)]
    return list(dict.fromkeys(found))


def metrics(plan: Plan, erased: Found, unedited: Mapping[str, list[Outcome]], never: Found, chance: Found) -> dict[str, Metric]:
    """The numbers of all attacks, each with the unedited model's, their false alarms, and what comes by chance."""
    kinds, outcomes, judge = {name: attack.kind for name, attack, _ in plan.attacks}, erased.outcomes, erased.judge
    searches = [name for name in outcomes if kinds.get(name, "prompt") == "prompt"]
    found = {f"asr[{name}]": share(outcomes[name], unedited[name], judge) for name in searches}
    if len(searches) > 1:
        after, before = (either([of[name] for name in searches]) for of in (outcomes, unedited))
        found[f"asr[{ANY}]"] = share(after, before, judge)
    found |= {f"probe[{name}]": share(outcomes[name], unedited[name], judge) for name in outcomes if name not in searches}
    counting = [name for name, attack, _ in plan.attacks if attack.counts]
    found |= {f"cost[{name}]": median_cost(outcomes[name], never.outcomes.get(name), judge) for name in counting}
    found |= {f"{NEVER}[{name}]": share(of, None, never.judge) for name, of in never.outcomes.items()}
    found |= {f"{CHANCE}[{name}]": share(of, None, chance.judge) for name, of in chance.outcomes.items()}
    return {name: metric.model_copy(update={"meaning": MEANINGS[split(name)[0]]}) for name, metric in found.items()}


@contextmanager
def _closing(model: ErasedModel) -> Iterator[ErasedModel]:
    try:
        yield model
    finally:
        model.close()


def _told(attack: str, done: int, total: int) -> None:
    progress(f"attack {attack}", done, total)
