import pytest

from erasekit.errors import UsageError
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.safety import reject_unsafe

SEXUAL = "nsfw"  # a term of the list; which one does not matter here


@pytest.mark.parametrize(
    "minor",
    ["a child", "Teenagers", "a SCHOOLGIRL", "a 12 year old", "a 9-year-old", "somebody aged 15", "\uff4b\uff49\uff44\uff53"],
)
def test_minors_with_sexual_terms_are_refused(minor):
    with pytest.raises(UsageError, match="Prompt 2 ") as error:
        reject_unsafe(["a cat", f"{SEXUAL} picture of {minor}"])
    assert "\n" not in str(error.value)
    assert minor not in str(error.value)


@pytest.mark.parametrize(
    "prompt", ["a child with a dog", f"{SEXUAL} picture of an adult", f"{SEXUAL}, a 30 year old", "kidney, Essex"]
)
def test_everything_else_passes(prompt):
    reject_unsafe([prompt])


@pytest.mark.parametrize(
    ("concept", "settings"),
    [
        ("a child", [f'guides=["a {SEXUAL} person"]']),
        ("a person", ['guides=["a dog", "a ' + SEXUAL + ' schoolgirl"]']),
        (SEXUAL, ['guides="a toddler"']),
    ],
)
def test_no_setting_may_make_of_a_concept_what_may_not_be_drawn(concept, settings):
    flags = {"method": "uce", "backbone": "sd15", "concepts": (concept,)}
    with pytest.raises(UsageError) as error:
        resolve(build(flags, overrides=[f"method.{setting}" for setting in settings]), default())
    expected = "A concept and a setting of the method pair minors with sexual terms, which erasekit refuses. Change it."
    assert str(error.value) == expected


def test_settings_and_concepts_that_are_harmless_together_pass():
    flags = {"method": "uce", "backbone": "sd15", "concepts": ("a child",)}
    assert resolve(build(flags, overrides=['method.guides=["a person"]']), default()).concepts[0].name == "a child"
    assert resolve(build(flags | {"concepts": (SEXUAL,)}, overrides=['method.guides=["a person"]']), default())
