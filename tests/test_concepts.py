"""A concept's phrases in prompts: which one is found, and what takes its place."""

import re

import pytest
from pydantic import ValidationError

from erasekit.concepts import EMPTY_PROMPT, NEUTRAL, TEMPLATES, Concept, contradictions
from erasekit.errors import UsageError

CAT = Concept(name="cat", phrases=("cat", "a cat"), neutral="a thing")


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [("a cat face", "a cat"), ("two cat images", "cat"), ("a catalogue", ""), ("a bobcat", ""), ("", "")],
)
def test_the_phrase_found_is_the_longest_that_stands_there_as_whole_words(prompt, phrase):
    assert CAT.find(prompt) == phrase


def test_every_phrase_is_replaced_the_longest_first():
    assert CAT.neutralise("a cat and one cat in a catalogue") == "a thing and one a thing in a catalogue"


def test_neutral_words_are_taken_as_they_stand():
    assert CAT.model_copy(update={"neutral": r"a \1 thing"}).neutralise("a cat") == r"a \1 thing"


def test_without_a_neutral_word_the_prompt_becomes_empty():
    assert CAT.model_copy(update={"neutral": ""}).neutralise("a cat") == ""


def test_the_empty_prompt_takes_the_place_of_every_prompt():
    concept = CAT.model_copy(update={"neutral": EMPTY_PROMPT})
    assert concept.neutralise("a cat on a mat") == concept.neutralise("something that purrs") == ""


def test_a_prompt_that_holds_no_phrase_becomes_the_neutral_words():
    assert CAT.neutralise("something that purrs") == "a thing"
    assert CAT.replaced("something  that purrs") == "something  that purrs"
    assert CAT.model_copy(update={"neutral": ""}).replaced("a photo of a cat  there") == "a photo of there"


@pytest.mark.parametrize(
    ("text", "name", "phrases"),
    [
        ("cat", "cat", ("cat",)),
        (" big   cat : kitty ,, a  kitten,cat,kitty", "big cat", ("big cat", "kitty", "a kitten", "cat")),
        ("cat:", "cat", ("cat",)),
        ("cat:kitty:kitten", "cat", ("cat", "kitty:kitten")),
    ],
)
def test_a_concept_is_read_from_a_line(text, name, phrases):
    concept = Concept.parse(text)
    assert (concept.name, concept.phrases, concept.kind, concept.neutral) == (name, phrases, "free", "")
    assert concept.templates == TEMPLATES["free"]


def test_a_concept_without_a_name_or_of_two_lines_is_refused():
    with pytest.raises(UsageError, match="A concept needs a name, given ' :kitty'"):
        Concept.parse(" :kitty")
    with pytest.raises(UsageError, match=r"Cannot take the concept 'x{80}'"):
        Concept.parse("x" * 201)
    assert Concept.parse("x" * 200).name == "x" * 200


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{} {0}", "{} }", "{name}", "", "a {"])
def test_a_template_has_one_place_and_no_other_braces(template):
    with pytest.raises(ValidationError, match=r"a template has one '\{\}' and no other braces|line"):
        Concept(name="cat", phrases=("cat",), templates=(template,))


def test_every_phrase_stands_in_every_template():
    concept = Concept(name="cat", phrases=("cat", "kitty"), templates=("{}", "a photo of {}"))
    assert concept.templates == ("{}", "a photo of {}")
    assert concept.prompts() == ["cat", "a photo of cat", "kitty", "a photo of kitty"]
    assert concept.prompts(("{}!",)) == ["cat!", "kitty!"]


@pytest.mark.parametrize("kind", NEUTRAL)
def test_each_kind_has_its_neutral_words_and_templates(kind):
    """The words themselves are plain: letters, and one place for the phrase."""
    concept = CAT.of_kind(kind)
    assert (concept.kind, concept.neutral, concept.templates) == (kind, NEUTRAL[kind], TEMPLATES[kind])
    assert Concept(**concept.model_dump()) == concept
    plain = "a an the photo of picture image drawing painting portrait landscape by in style smiling close up"
    plain += " object person artist wearing clothes something"
    assert {word for t in (*concept.templates, concept.neutral) for word in re.findall("[^{} -]+", t)} <= {*plain.split()}


def test_a_concept_stays_what_it_is_and_has_no_other_keys():
    with pytest.raises(ValidationError, match="frozen"):
        CAT.name = "dog"
    with pytest.raises(ValidationError, match="Extra"):
        Concept(name="cat", phrases=("cat",), colour="black")
    for missing in ({"phrases": ()}, {"templates": ()}, {"name": ""}):
        with pytest.raises(ValidationError):
            Concept(**{"name": "cat", "phrases": ("cat",)} | missing)


def test_an_accent_is_one_letter_however_it_is_written():
    written = [Concept.parse(text).name for text in ("\u00c9douard Manet", "E\u0301douard Manet")]
    assert written[0] == written[1] == "\u00c9douard Manet"


@pytest.mark.parametrize(
    ("concepts", "told"),
    [
        ([{"phrases": ("cat",), "neutral": "a Cat"}], "The neutral words of 'cat' are 'a Cat', which is what is erased"),
        (
            [{"phrases": ("cat", "kitty"), "preserve": ("dog", "the kitty")}],
            "'the kitty' is to be erased, as 'cat', and to stay",
        ),
        ([{"phrases": ("cat",)}, {"name": "pet", "phrases": ("pet", "a cat")}], "'cat' stands for both 'cat' and 'pet'"),
    ],
)
def test_what_is_to_be_erased_and_to_stay_is_named(concepts, told):
    (line,) = contradictions([Concept(**{"name": "cat"} | values) for values in concepts])
    assert line.startswith(told)


def test_neighbours_are_no_contradiction():
    near = [("car", "cart"), ("cat", "cat food"), ("Claude Monet", "Édouard Manet")]
    for one, other in near:
        first = Concept(name=one, phrases=(one,), neutral="something", preserve=(other,))
        assert contradictions([first, Concept(name=other, phrases=(other,), preserve=(one,))]) == []
