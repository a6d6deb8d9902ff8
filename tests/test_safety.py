import pytest

from erasekit.errors import UsageError
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
