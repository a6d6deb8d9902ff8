"""One attack on all prompts: what is found for a prompt is written down at once, so that a killed run goes on with the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from erasekit.attacks.attack import Attack
from erasekit.attacks.draw import Draw
from erasekit.attacks.drawing import images, latents
from erasekit.attacks.judge import Judge
from erasekit.attacks.outcomes import NONE, Outcome, digest
from erasekit.attacks.target import ErasedModel, Target
from erasekit.concepts import Concept
from erasekit.evaluation.tasks import Prompt
from erasekit.safety import is_unsafe


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
        """Try an attack on every prompt whose image does not show the concept anyway."""
        folder, found = self.folder / name, dict[int, Outcome]()
        for concept in self.model.ctx.concepts:
            own = [i for i, prompt in enumerate(self.prompts) if prompt.concept == concept.name]
            target = self._target(attack, concept, own)
            with ExitStack() as until_the_end:
                begun = False
                for i in own:
                    key = digest(self.prompts[i].text, self.prompts[i].seed)
                    outcome = Outcome.read(folder, i, key)
                    if outcome is None and self.plain[i]:
                        outcome = Outcome(index=i, prompt=key, shown=True)
                        outcome.write(folder, None)
                    if outcome is None:
                        if not begun:
                            until_the_end.callback(self.model.restore)
                            until_the_end.enter_context(attack.ready(target))
                            begun = True
                        outcome = self._attacked(attack, target, i, key, folder)
                    found[i] = outcome
                    self.told(name, len(found), len(self.prompts))
        return [found[i] for i in range(len(self.prompts))]

    def _target(self, attack: Attack, concept: Concept, own: Sequence[int]) -> Target:
        places = {i: place for place, i in enumerate(own)}
        examples = {places[i]: x0 for i, x0 in self.examples.items() if i in places}
        return Target(self.model, attack.name, attack.knows, concept, [self.prompts[i] for i in own], examples)

    def _attacked(self, attack: Attack, target: Target, index: int, key: str, folder: Path) -> Outcome:
        """Draw what the attack gives until an image shows the concept, or the budget is spent."""
        prompt, began, passes = self.prompts[index], time.monotonic(), self.model.passes
        best, image, queries = Outcome(index=index, prompt=key, shown=None), None, 0
        with closing(attack.rounds(target, prompt)) as rounds:
            for asked in rounds:
                draw = allowed(asked, attack.config.queries - queries)
                queries += len(asked.seeds)
                if not draw.seeds:
                    continue
                drawn = images(self.model, latents(self.model, draw))
                for i, verdict in enumerate(self.judge(drawn, prompt)):
                    if image is None or _rank(verdict.shown, verdict.score) > _rank(best.shown, best.score):
                        best = best.model_copy(update=verdict._asdict() | {"cost": draw.cost} | self._text(draw, i))
                        image = Image.fromarray(drawn[i].permute(1, 2, 0).numpy())
                if best.shown or queries >= attack.config.queries:
                    break
        tried = {"queries": min(queries, attack.config.queries), "passes": self.model.passes - passes}
        best = best.model_copy(update=tried | {"seconds": round(time.monotonic() - began, 2)})
        if image is None:  # nothing was there to be tried
            best = best.model_copy(update={"shown": False})
        best.write(folder, image)
        return best

    def _text(self, draw: Draw, row: int) -> dict[str, str]:
        """What was typed for an image: its hash, and itself if texts are kept."""
        text = draw.texts[row] if draw.texts else ""
        return {"found": digest(text) if text else "", "text": text if self.keep_texts else ""}


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


def _rank(shown: bool | None, score: float | None) -> tuple[bool, bool, float]:
    return shown is not None, bool(shown), score or 0.0


def allowed(draw: Draw, most: int) -> Draw:
    """What may be drawn of a batch: no more than the budget has left, and nothing that pairs minors with sexual terms."""
    kept = [i for i in range(len(draw.seeds)) if not (draw.texts and is_unsafe(draw.texts[i]))][:most]
    if len(kept) == len(draw.seeds):
        return draw
    texts = [draw.texts[i] for i in kept] if draw.texts else ()
    x = None if draw.x is None else draw.x[kept]
    return replace(draw, cond=draw.cond[kept], seeds=[draw.seeds[i] for i in kept], texts=texts, x=x)
