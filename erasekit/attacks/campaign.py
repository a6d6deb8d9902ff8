"""One attack on all prompts: what is found for a prompt is written down at once, so that a killed run goes on with the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from erasekit.attacks.attack import Attack
from erasekit.attacks.attempt import Attempt
from erasekit.attacks.draw import Draw, merged
from erasekit.attacks.drawing import images, latents
from erasekit.attacks.judge import Judge
from erasekit.attacks.outcomes import NONE, Outcome, digest
from erasekit.attacks.target import ErasedModel, Target
from erasekit.concepts import Concept
from erasekit.errors import EnvironmentProblem
from erasekit.evaluation.tasks import Prompt


@dataclass(frozen=True)
class Campaign:
    """Whom attacks are tried on, and how it is judged.

    Attributes:
        model: the erased model, or the unedited one.
        prompts: what asks for its concepts.
        plain: of each prompt whether it shows the concept without an attack; None if its image could not be judged.
        examples: latents (1, ...) of images of the concepts by the index of their prompt.
        judge: says whether an image shows a concept.
        folder: what is found goes to a folder of the attack's name in it.
        keep_texts: keep what has to be typed, and not only its hash.
        told: called with (attack, prompts done, prompts in all).
    """

    model: ErasedModel
    prompts: Sequence[Prompt]
    plain: Sequence[bool | None]
    examples: Mapping[int, torch.Tensor]
    judge: Judge
    folder: Path
    keep_texts: bool = False
    told: Callable[[str, int, int], None] = lambda attack, done, total: None

    def run(self, name: str, attack: Attack) -> list[Outcome]:
        """Try an attack on every prompt whose image does not show the concept anyway, `together` prompts side by side."""
        folder, found = self.folder / name, dict[int, Outcome]()
        for concept in self.model.ctx.concepts:
            own = [i for i, prompt in enumerate(self.prompts) if prompt.concept == concept.name]
            found |= {i: self._shown(i, folder) for i in own if self.plain[i]}
            self.told(name, len(found), len(self.prompts))
            target = self._target(attack, concept, own)
            unshown, size = [i for i in own if not self.plain[i]], attack.config.together
            with ExitStack() as until_the_end:
                begun = False
                for group in (unshown[k : k + size] for k in range(0, len(unshown), size)):
                    outcomes = [o for i in group if (o := Outcome.read(folder, i, self._key(i)))]
                    if len(outcomes) < len(group):
                        if not begun:
                            until_the_end.callback(self.model.restore)
                            until_the_end.enter_context(attack.ready(target))
                            begun = True
                        with _room(name, len(group)):
                            outcomes = self._attacked(attack, target, group, folder)
                    found |= dict(zip(group, outcomes, strict=True))
                    self.told(name, len(found), len(self.prompts))
        return [found[i] for i in range(len(self.prompts))]

    def _key(self, index: int) -> str:
        return digest(self.prompts[index].text, self.prompts[index].seed)

    def _shown(self, index: int, folder: Path) -> Outcome:
        """Nothing has to be tried for a prompt that shows the concept as it is."""
        outcome = Outcome(index=index, prompt=self._key(index), shown=True)
        if Outcome.read(folder, index, outcome.prompt) is None:
            outcome.write(folder, None)
        return outcome

    def _target(self, attack: Attack, concept: Concept, own: Sequence[int]) -> Target:
        places = {i: place for place, i in enumerate(own)}
        examples = {places[i]: x0 for i, x0 in self.examples.items() if i in places}
        return Target(self.model, attack.name, attack.knows, concept, [self.prompts[i] for i in own], examples)

    def _attacked(self, attack: Attack, target: Target, group: Sequence[int], folder: Path) -> list[Outcome]:
        """Draw what the attack gives until an image of each prompt shows the concept, or its budget is spent."""
        blank = [Outcome(index=i, prompt=self._key(i), shown=None) for i in group]
        attempts = [Attempt(self.prompts[o.index], o, attack.config.queries, self.keep_texts) for o in blank]
        with closing(attack.side_by_side(target, [attempt.prompt for attempt in attempts])) as rounds:
            sent: list[bool] | None = None
            while going := [attempt for attempt in attempts if attempt.wanted]:
                began, passes = time.monotonic(), self.model.passes
                self._draw(attempts, _sent(rounds, sent) or [None] * len(attempts))
                for attempt in going:
                    attempt.seconds += (time.monotonic() - began) / len(going)
                    attempt.passes += (self.model.passes - passes) / len(going)
                sent = [attempt.wanted for attempt in attempts]
        return [attempt.end(folder) for attempt in attempts]

    def _draw(self, attempts: Sequence[Attempt], draws: Sequence[Draw | None]) -> None:
        """Draw and judge what is asked for, as far as the budgets allow it, in as few batches as possible."""
        asked: list[tuple[Attempt, Draw]] = []
        for attempt, draw in zip(attempts, draws, strict=True):
            if draw is None:
                attempt.over = True
            elif attempt.wanted and len((may := attempt.ask(draw)).seeds):
                asked.append((attempt, may))
        for whole, places in merged([draw for _, draw in asked]):
            drawn = images(self.model, latents(self.model, whole))
            parts = drawn.split([len(asked[place][1].seeds) for place in places])
            for place, part in zip(places, parts, strict=True):
                attempt, draw = asked[place]
                attempt.take(draw, part, self.judge(part, attempt.prompt))


@contextmanager
def _room(attack: str, together: int) -> Iterator[None]:
    """Say which way is out where prompts side by side need more memory than there is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if together == 1:
            raise
        fewer = f"Try '-s attacks.{attack}.together={together // 2}'."
        line = f"The GPU ran out of memory as '{attack}' was tried on {together} prompts side by side. {fewer}"
        raise EnvironmentProblem(line) from error


def _sent(rounds: Generator[list[Draw | None], Sequence[bool] | None], wanted: Sequence[bool] | None) -> list[Draw | None]:
    """The next round; nothing if there is none."""
    try:
        return rounds.send(wanted)
    except StopIteration:
        return []


def plain(campaign: Campaign, batch: int) -> list[Outcome]:
    """What the prompts show without an attack, drawn in batches."""
    folder, found = campaign.folder / NONE, list[Outcome]()
    keys = [digest(prompt.text, prompt.seed) for prompt in campaign.prompts]
    for start in range(0, len(keys), batch):
        rows = range(start, min(start + batch, len(keys)))
        known = [Outcome.read(folder, i, keys[i]) for i in rows]
        if not all(known):
            prompts = [campaign.prompts[i] for i in rows]
            encoded = campaign.model.ctx.backbone.encode([p.text for p in prompts])
            drawn = images(campaign.model, latents(campaign.model, Draw(encoded, [p.seed for p in prompts])))
            verdicts = [campaign.judge(drawn[[k]], prompt)[0] for k, prompt in enumerate(prompts)]
            fresh = [Outcome(index=i, prompt=keys[i], queries=1, **v._asdict()) for i, v in zip(rows, verdicts, strict=True)]
            for k, outcome in enumerate(fresh):
                outcome.write(folder, Image.fromarray(drawn[k].permute(1, 2, 0).numpy()))
            known = list(fresh)
        found += [outcome for outcome in known if outcome]
        campaign.told(NONE, len(found), len(keys))
    return found
