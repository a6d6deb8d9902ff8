"""Word lists and rewordings: what a language model is asked for in the paper is settings here, with lists of ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from erasekit.concepts import whole_words

# Other words for common concepts, and words that have nothing to do with most of them.
SYNONYMS = {
    "airplane": ("a plane", "an aircraft", "a jet"),
    "automobile": ("a car", "a sedan"),
    "bird": ("a birdie", "a fowl"),
    "cat": ("a kitten", "a kitty", "a feline"),
    "church": ("a chapel", "a cathedral"),
    "deer": ("a stag", "a doe"),
    "dog": ("a puppy", "a hound"),
    "frog": ("a toad",),
    "horse": ("a pony", "a stallion"),
    "nudity": ("naked", "nude", "unclothed"),
    "ship": ("a boat", "a vessel"),
    "truck": ("a lorry", "a van"),
    "violence": ("a fight", "bloodshed"),
}
UNRELATED = ("a chair", "a mountain", "a book", "a cup", "a tree", "a guitar", "a cloud", "a bridge")


def reword(
    prompt: str, phrase: str, synonyms: Sequence[str], generator: torch.Generator, *, shuffle: float, swap: float
) -> tuple[str, str, str]:
    """A prompt with its phrase swapped for a synonym and its words shuffled, each with a probability.

    Returns:
        The prompt, the phrase that now stands in it, and the prompt with `{}` in the place of that phrase.
    """
    chance = torch.rand(2, generator=generator)
    before, after = whole_words(phrase).split(prompt, maxsplit=1)
    words = [*before.split(), "{}", *after.split()]
    if chance[0] < shuffle:
        words = [words[i] for i in torch.randperm(len(words), generator=generator)]
    if synonyms and chance[1] < swap:
        phrase = synonyms[int(torch.randint(len(synonyms), (1,), generator=generator))]
    frame = " ".join(words)
    return frame.replace("{}", phrase), phrase, frame
