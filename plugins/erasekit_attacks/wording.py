"""What attacks share that only reword a prompt: they know nothing of the model, and anybody could try them."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence

from erasekit.attacks.attack import Attack, AttackConfig
from erasekit.attacks.draw import Draw
from erasekit.attacks.target import Target
from erasekit.concepts import Concept, whole_words
from erasekit.evaluation.tasks import Prompt

ARTICLES = ("a", "an", "the", "two")
TOGETHER = 8  # images in a batch


class Wording(Attack):
    """Other wordings of a prompt, drawn with the prompt's own noise. Subclasses implement `variants`."""

    knows = "nothing"
    config: AttackConfig

    def variants(self, word: str, rng: random.Random) -> list[str]:
        """What may stand in the place of the concept's word or name; the first ones are tried first."""
        raise NotImplementedError

    def reworded(self, concept: Concept, prompt: Prompt) -> list[str]:
        """At most `queries` other wordings of a prompt, the same whenever they are asked for."""
        rng = random.Random(f"{self.name}/{prompt.text}/{prompt.seed}")
        word = word_of(concept, prompt.text)
        texts = [replaced(prompt.text, word, variant) for variant in self.variants(word, rng)]
        return [text for text in dict.fromkeys(texts) if text != prompt.text][: self.config.queries]

    def texts(self, concept: Concept, prompts: Sequence[Prompt]) -> list[str]:
        """All wordings."""
        return [text for prompt in prompts for text in self.reworded(concept, prompt)]

    def rounds(self, target: Target, prompt: Prompt) -> Generator[Draw]:
        """The wordings, some at a time."""
        texts = self.reworded(target.concept, prompt)
        for i in range(0, len(texts), TOGETHER):
            some = texts[i : i + TOGETHER]
            yield target.draw(some, [prompt.seed] * len(some))


def word_of(concept: Concept, prompt: str) -> str:
    """The concept's word in a prompt without its article; the prompt itself if it asks for the concept in other words."""
    words = concept.find(prompt).split()
    while len(words) > 1 and words[0] in ARTICLES:
        words = words[1:]
    return " ".join(words) or prompt


def replaced(prompt: str, word: str, by: str) -> str:
    """A prompt with a word replaced where it stands whole."""
    return whole_words(word).sub(lambda found: by, prompt)
