"""Other words for a concept: what the mini models' encoder names is what the world's vocabulary has, and nothing else."""

from __future__ import annotations

import pytest
import torch

from erasekit.concepts import Concept
from erasekit.methods.near_words import near_words
from erasekit.testing import tiny
from erasekit_mini import vocabulary as words
from erasekit_mini.backbone import FluxMini, Sd15Mini
from erasekit_mini.tasks import Objects


@pytest.fixture(scope="module", params=[Sd15Mini, FluxMini])
def mini(request):
    return request.param.load(request.param.Config(device="cpu"))


@pytest.mark.parametrize("name", Objects.concepts)
def test_the_mini_encoder_names_synonyms_and_plurals(mini, name):
    concept = Objects().concept(name)
    own = {words.article(w) for w in words.OBJECTS[name]} | {words.plural(w) for w in words.OBJECTS[name]}
    found = near_words(mini, concept, 16)
    bare = [phrase for phrase in found if not phrase.startswith("two ")]
    assert set(bare) <= own - set(concept.phrases)
    synonyms = {words.article(w) for w in words.OBJECTS[name]} - set(concept.phrases)
    assert synonyms <= set(bare)
    assert found[len(bare) :] == tuple(f"two {phrase.split()[-1]}" for phrase in (concept.phrases[0], *bare))
    assert near_words(mini, concept, 2)[:2] == found[:2]
    assert len(near_words(mini, concept, 2)) == 5


def test_what_the_user_said_and_what_is_kept_is_not_named_again(mini):
    concept = Objects().concept("cat:kitten")
    assert "a kitten" in concept.phrases
    assert "a kitten" not in near_words(mini, concept, 16)
    kept = concept.model_copy(update={"preserve": (*concept.preserve, "a kitty")})
    assert near_words(mini, kept, 16) == ()  # halfway from a synonym that is kept there is nothing


def test_without_anything_kept_there_is_no_scale(mini):
    assert near_words(mini, Objects().concept("cat").model_copy(update={"preserve": ()}), 16) == ()
    assert near_words(mini, Objects().concept("cat"), 0) == ()


def test_the_vocabulary_is_sorted_by_its_embeddings(tiny_folder):
    backbone = tiny.load(tiny_folder)
    found = backbone.vocabulary("red ship", 5)
    assert found[:2] in (["red", "ship"], ["ship", "red"])
    tokenizer = backbone.pipeline().tokenizer
    table = backbone.pipeline().text_encoder.get_input_embeddings().weight.detach().double()
    unit = {w: table[tokenizer(w, add_special_tokens=False).input_ids[0]] for w in tiny.WORDS if len(w) > 2}
    unit = {w: v / v.norm() for w, v in unit.items()}
    nearness = {w: max(float(v @ unit["red"]), float(v @ unit["ship"])) for w, v in unit.items()}
    assert found[2:] == sorted(nearness, key=lambda w: -nearness[w])[2:5]


def test_phrases_take_the_article_that_the_concept_has(mini, monkeypatch):
    """The world's words all keep their meaning here; only the grammar is looked at."""
    monkeypatch.setattr(mini, "vocabulary", lambda near, n: ["aircraft", "jets", "jet"])
    concept = Objects().concept("airplane")
    counted = {"two airplane", "two aircraft", "two jet", "two jets"}
    assert set(near_words(mini, concept, 16)) == {"an aircraft", "a jet", "jets"} | counted
    bare = Concept(name="airplane", phrases=("airplane",), preserve=concept.preserve)
    assert set(near_words(mini, bare, 16)) <= {"aircraft", "jet", "jets"}


def test_cosines_are_of_centred_summaries(mini):
    """The rule by hand, in float64."""
    concept = Objects().concept("deer")
    candidates = [w for w in mini.vocabulary("a deer", 128) if w not in " ".join((*concept.phrases, *concept.preserve)).split()]
    cond = mini.encode([f"a photo of {p}" for p in ("a deer", *concept.preserve, *candidates)])
    rows = (
        cond.pooled
        if cond.pooled is not None
        else torch.stack([t[n - 1] for t, n in zip(cond.tokens, cond.lengths, strict=True)])
    )
    rows = rows.double() - rows.double().mean(0)
    cosine = (rows @ rows[0]) / rows.norm(dim=1) / rows[0].norm()
    least = (1 + cosine[1 : 1 + len(concept.preserve)].max()) / 2
    named = {w for w, c in zip(candidates, cosine[1 + len(concept.preserve) :], strict=True) if c > least}
    assert {phrase.split()[-1] for phrase in near_words(mini, concept, 99)} == named | {"deer"}
