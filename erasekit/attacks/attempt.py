"""One prompt while it is attacked: what was drawn for it so far, and the best of that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from erasekit.attacks.draw import Draw
from erasekit.attacks.judge import Verdict
from erasekit.attacks.outcomes import Outcome, digest
from erasekit.evaluation.tasks import Prompt
from erasekit.safety import is_unsafe


@dataclass
class Attempt:
    """An attack on one prompt.

    Attributes:
        prompt: what is attacked.
        outcome: the best that was found.
        budget: images that may be drawn.
        keep_texts: keep what has to be typed, and not only its hash.
        image: the one that shows the concept, or is the likeliest to.
        queries: images that were asked for.
        passes: rows that went through the denoiser.
        seconds: what it took.
        over: the attack has nothing more to try.
    """

    prompt: Prompt
    outcome: Outcome
    budget: int
    keep_texts: bool = False
    image: Image.Image | None = None
    queries: int = 0
    passes: float = 0.0
    seconds: float = 0.0
    over: bool = False

    @property
    def wanted(self) -> bool:
        """Whether more is to be tried."""
        return not (self.over or self.outcome.shown or self.queries >= self.budget)

    def ask(self, draw: Draw) -> Draw:
        """What may be drawn of it; all of it counts."""
        left, self.queries = self.budget - self.queries, self.queries + len(draw.seeds)
        return allowed(draw, left)

    def take(self, draw: Draw, images: torch.Tensor, verdicts: list[Verdict]) -> None:
        """Keep the best of some images (n, 3, h, w), uint8."""
        for i, verdict in enumerate(verdicts):
            if self.image is None or _rank(verdict.shown, verdict.score) > _rank(self.outcome.shown, self.outcome.score):
                text = draw.texts[i] if draw.texts else ""
                typed = {"found": digest(text) if text else "", "text": text if self.keep_texts else ""}
                self.outcome = self.outcome.model_copy(update=verdict._asdict() | {"cost": draw.cost} | typed)
                self.image = Image.fromarray(images[i].permute(1, 2, 0).numpy())

    def end(self, folder: Path) -> Outcome:
        """Write down what was found, and give it back."""
        tried = {"queries": min(self.queries, self.budget), "passes": round(self.passes), "seconds": round(self.seconds, 2)}
        if self.image is None:  # nothing was there to be tried
            tried["shown"] = False
        self.outcome = self.outcome.model_copy(update=tried)
        self.outcome.write(folder, self.image)
        return self.outcome


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
