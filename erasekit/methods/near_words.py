"""Other words for a concept, named by the model's own text encoder."""

from __future__ import annotations

from torch.nn.functional import normalize

from erasekit.backbones.protocol import Backbone
from erasekit.concepts import Concept

SHORTLIST = 128  # words of the vocabulary that are encoded
FRAME = "a photo of {}"
ARTICLES = ("a", "an")


def near_words(backbone: Backbone, concept: Concept, most: int) -> tuple[str, ...]:
    """Phrases that the text encoder reads nearly as it does a concept, nearest first, of at most `most` words.

    Each word comes as a name ("a sedan", "cars") and counted ("two sedans"), since a count changes how a word is read; so does
    the concept's own noun. Concepts without an article, which nobody counts, get the names alone.

    A word counts if it is nearer to the concept than halfway from the nearest phrase that the concept preserves: cos(word,
    concept) > (1 + max cos(preserved, concept)) / 2, cosines of the summaries of "a photo of ..." less their mean. A
    concept that preserves nothing has no such scale and gets no words. `most` is of words, not of phrases.
    """
    own, kept = concept.phrases[0], [p for p in concept.preserve if p not in concept.phrases]
    said = {word for phrase in (*concept.phrases, *kept) for word in phrase.lower().split()}
    noun = " ".join(word for word in own.split() if word.lower() not in ARTICLES) or own
    words = [word for word in backbone.vocabulary(noun, SHORTLIST) if word not in said] if most and kept else []
    if not words:
        return ()
    rows = backbone.summaries([FRAME.format(phrase) for phrase in (own, *kept, *words)])
    rows = normalize(rows - rows.mean(0), dim=1)
    cosine = rows[1:] @ rows[0]
    least = (1 + float(cosine[: len(kept)].max())) / 2
    nearness = cosine[len(kept) :].tolist()
    found = sorted((-near, word) for near, word in zip(nearness, words, strict=True) if near > least)
    named = [word for _, word in found[:most]]
    countable = named and own.split()[0] in ARTICLES
    counted = [f"two {word}" for word in (own.split()[-1], *named)] if countable else []
    return (*(_phrase(word, like=own) for word in named), *counted)


def _phrase(word: str, *, like: str) -> str:
    """A word with an article, if the phrase that it stands for has one and it is no plural."""
    if like.split()[0] not in ARTICLES or (word.endswith("s") and not word.endswith("ss")):
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
