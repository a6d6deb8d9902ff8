"""A concept's phrases in prompts: which one is found, and what takes its place."""

import pytest

from erasekit.concepts import Concept

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
