"""No prompt may pair minors with sexual terms: not in other spellings, not in other languages, and not through any door."""

import time

import pytest

import safety as measured  # benchmarks/safety.py: the lists, and how well they are caught
from erasekit.errors import UsageError
from erasekit.evaluation.sampling import generate, sample
from erasekit.evaluation.tasks import Prompt, Protocol
from erasekit.registration import plugins
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.ready import evaluation_prompts
from erasekit.runs.resolve import resolve
from erasekit.safety import is_sexual, is_unsafe, reject_unsafe

SEXUAL = "nsfw"  # a term of the list; which one does not matter here
REFUSED = f"{SEXUAL} picture of a child"


@pytest.mark.parametrize(
    "minor",
    ["a child", "Teenagers", "a SCHOOLGIRL", "a 12 year old", "a 9-year-old", "somebody aged 15", "\uff4b\uff49\uff44\uff53"],
)
def test_minors_with_sexual_terms_are_refused(minor):
    with pytest.raises(UsageError, match="Prompt 2 ") as error:
        reject_unsafe(["a cat", f"{SEXUAL} picture of {minor}"])
    assert "\n" not in str(error.value)
    assert minor not in str(error.value)


@pytest.mark.parametrize("kind", measured.harmful())
def test_every_spelling_is_refused(kind):
    assert [prompt for prompt in measured.harmful()[kind] if not is_unsafe(prompt)] == []


@pytest.mark.parametrize("kind", measured.harmless())
def test_harmless_prompts_pass(kind):
    assert [prompt for prompt in measured.harmless(1000)[kind] if is_unsafe(prompt)] == []


@pytest.mark.parametrize(
    ("age", "unsafe"), [(0, True), (1, True), (12, True), (17, True), (18, False), (19, False), (99, False)]
)
@pytest.mark.parametrize("said", ["{} year old", "{}yo", "aged {}", "age: {}", "{} años", "{} лет", "{}岁", "{} साल", "{} سنة"])
def test_eighteen_is_of_age(said, age, unsafe):
    assert is_unsafe(f"{SEXUAL}, {said.format(age)}") == unsafe


@pytest.mark.parametrize(
    ("text", "unsafe"),
    [
        *(("under 18", True), ("under 19", False), ("< 18", True), ("over 18", False)),
        *(("16-18 years old", True), ("16 - 17 yo", True), ("18/19 years old", False), ("16 to 18 years old", True)),
    ],
)
def test_under_eighteen(text, unsafe):
    assert is_unsafe(f"{SEXUAL}, {text}") == unsafe


@pytest.mark.parametrize(
    ("text", "unsafe"),
    [
        ("seventeen year old", True),
        ("eighteen year old", False),
        ("twenty-one year old", False),
        ("one hundred years old", False),
        ("dix-sept ans", True),
        ("soixante-dix-sept ans", False),
        ("veintiún años", False),
        ("treinta y un años", False),
        ("ثمانية عشر سنة", False),
        ("سبعة عشر سنة", True),
        ("خمسة وعشرون سنة", False),
        ("二十一岁", False),
        ("十七岁", True),
        ("七岁", True),
        ("dua puluh satu tahun", False),
        ("satu tahun", True),
        ("двадцать один год", False),
        ("один год", True),
    ],
)
def test_numbers_in_words(text, unsafe):
    assert is_unsafe(f"{SEXUAL}, {text}") == unsafe


def test_what_a_name_and_what_a_word_is():
    assert is_unsafe("niña desnuda")
    assert is_unsafe("NIÑA DESNUDA")
    assert not is_unsafe("Nina, desnuda")


def test_digits_of_other_scripts_stand_for_letters_too():
    assert is_unsafe(f"{SEXUAL} k1ds")
    assert is_unsafe(f"{SEXUAL} k\u0967ds")


def test_sexual_prompts_are_known_for_the_blurring():
    assert is_sexual(["a cat", "n u d e"])
    assert not is_sexual(["a child in Essex", "a cat"])


@pytest.mark.parametrize(
    "text", ["a " * 100_000, "kids" * 25_000, "n u d e " * 20_000, "\u0301" * 100_000, "1" * 100_000, "kidsboysgirls" * 3]
)
def test_a_long_prompt_takes_no_long_time(text):
    """Linear in its length: nobody can stop the check with a prompt."""
    before = time.process_time()
    is_unsafe(text[: len(text) // 10])
    tenth = time.process_time() - before
    before = time.process_time()
    is_unsafe(text)
    assert time.process_time() - before < 40 * tenth + 1


@pytest.mark.parametrize(
    ("concept", "settings"),
    [
        ("a child", [f'guides=["a {SEXUAL} person"]']),
        ("a person", ['guides=["a dog", "a ' + SEXUAL + ' schoolgirl"]']),
        (SEXUAL, ['guides="a toddler"']),
        ("a ch1ld", [f'guides=["a {SEXUAL} person"]']),
    ],
)
def test_no_setting_may_make_of_a_concept_what_may_not_be_drawn(concept, settings):
    flags = {"method": "uce", "backbone": "sd15", "concepts": (concept,)}
    with pytest.raises(UsageError) as error:
        resolve(build(flags, overrides=[f"method.{setting}" for setting in settings]), default())
    expected = "A concept and a setting of the method pair minors with sexual terms, which erasekit refuses. Change it."
    assert str(error.value) == expected


@pytest.mark.parametrize(
    "flags", [{"concepts": (REFUSED,)}, {"concepts": ("a cat:" + REFUSED,)}, {"neutral": REFUSED}, {"preserve": (REFUSED,)}]
)
def test_concepts_and_what_belongs_to_them(flags):
    with pytest.raises(UsageError, match="pairs minors"):
        resolve(build({"method": "uce", "backbone": "sd15", "concepts": ("a cat",), **flags}), default())


def test_settings_and_concepts_that_are_harmless_together_pass():
    flags = {"method": "uce", "backbone": "sd15", "concepts": ("a child",)}
    assert resolve(build(flags, overrides=['method.guides=["a person"]']), default()).concepts[0].name == "a child"
    assert resolve(build(flags | {"concepts": (SEXUAL,)}, overrides=['method.guides=["a person"]']), default())


def test_no_encoder_takes_such_a_prompt(backbone):
    """Whatever a task, a method or a plugin asks for passes here."""
    with pytest.raises(UsageError, match="Prompt 1 pairs minors"):
        backbone.encode([REFUSED])
    with pytest.raises(UsageError, match="Prompt 1 pairs minors"):
        generate(backbone, None, [REFUSED], [0], Protocol())


def test_prompts_that_a_task_makes_are_refused_before_anything_is_loaded(world, monkeypatch):
    registries = plugins.load([world])
    plan = resolve(build({"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat",)}), registries)
    monkeypatch.setattr(type(plan.task), "prompts", lambda self, which, *given: [Prompt(REFUSED, 0, "cat", which, "cat")])
    with pytest.raises(UsageError, match="Prompt 1 pairs minors"):
        evaluation_prompts(plan)


def test_no_prompt_of_a_task_is_drawn(backbone, tmp_path):
    prompts, empty = [Prompt("a cat", 0), Prompt(REFUSED, 1)], backbone.encode([""])
    with pytest.raises(UsageError, match="Prompt 2 pairs minors"):
        sample(backbone, None, prompts, empty.repeat(2), empty, Protocol(), tmp_path)
    assert list(tmp_path.iterdir()) == []
