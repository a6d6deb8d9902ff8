"""What a prompt becomes without its concept, and what the flags make of it."""

import pytest

from erasekit.backbones.schedule import Schedule, flow_tau
from erasekit.concepts import EMPTY_PROMPT, NEUTRAL, Concept
from erasekit.errors import UsageError
from erasekit.evaluation.free import Free
from erasekit.evaluation.tasks import Prompt
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import concept_pairs, neutral_of
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit_trace.method import _ring

CAT = Concept(name="cat", phrases=("a cat",), neutral="something", templates=("a photo of {}",))
DOG = Concept(name="dog", phrases=("a dog",), neutral="an object", templates=("{}",))


@pytest.mark.parametrize(
    ("neutral", "named", "evoked"),
    [("something", "something in a garden", "something"), ("", "in a garden", ""), (EMPTY_PROMPT, "", "")],
)
def test_the_neutral_words_take_the_place_of_the_concepts_own(neutral, named, evoked):
    concept = CAT.model_copy(update={"neutral": neutral})
    assert concept.neutralise("a cat in a garden") == named
    assert concept.neutralise("whiskers") == evoked  # a prompt that only evokes it
    assert neutral_of(Prompt("a cat in a garden", 0, concept="cat"), [concept]) == named
    assert neutral_of(Prompt("whiskers", 0, concept="cat"), [concept]) == evoked


def test_a_task_knows_better_unless_the_empty_prompt_is_asked_for():
    prompt = Prompt("a furry friend on a mat", 0, concept="cat", neutral="a cushion on a mat")
    assert neutral_of(prompt, [CAT]) == "a cushion on a mat"
    assert neutral_of(prompt, [CAT.model_copy(update={"neutral": EMPTY_PROMPT})]) == ""


def test_a_prompt_of_two_concepts_loses_both_and_one_of_another_keeps_its_words():
    both = Prompt("a cat and a dog", 0, concept="cat+dog")
    assert neutral_of(both, [CAT, DOG]) == "something and an object"
    assert neutral_of(Prompt("a ship", 0), [CAT, DOG]) == "a ship"


def test_pairs_are_the_concepts_prompts_and_the_tasks():
    asked = [Prompt("look, a cat", 0, concept="cat"), Prompt("whiskers", 0, concept="cat"), Prompt("a dog", 0, concept="dog")]
    assert concept_pairs(CAT, asked) == [
        ("a photo of a cat", "a photo of something"),
        ("look, a cat", "look, something"),
        ("whiskers", "something"),
    ]


def plan(**flags):
    return resolve(build({"method": "uce", "backbone": "sd15", "concepts": ("Ann Lee",)} | flags), default())


def test_the_kind_decides_neutral_words_and_templates_and_the_user_overrides():
    assert plan().concepts[0].neutral == NEUTRAL["free"]
    (concept,) = plan(kind="identity").concepts
    assert (concept.kind, concept.neutral) == ("identity", "a person")
    assert "a portrait of {}" in concept.templates
    assert plan(kind="identity", neutral="a man").concepts[0].neutral == "a man"
    assert plan(preserve=("Bo Kim",)).concepts[0].preserve == ("Bo Kim",)


def test_a_kind_that_a_task_decides_is_not_for_the_user():
    with pytest.raises(UsageError, match=r"'cat' is of kind object in its task, given --kind style"):
        resolve(build({"method": "uce", "backbone": "sd15-mini", "concepts": ("cat",), "kind": "style"}), default())


def test_neutral_and_preserved_words_are_checked_too():
    with pytest.raises(UsageError, match="pairs minors with sexual terms"):
        plan(neutral="a child nude")
    with pytest.raises(UsageError, match="pairs minors with sexual terms"):
        plan(preserve=("a naked boy",))


def test_prompts_of_a_style_show_something_in_it():
    concept = Free().concept("Ann Lee").of_kind("style")
    prompts = Free().prompts("erase", [concept], "evaluation")
    assert all(p.text.endswith("in the style of Ann Lee") for p in prompts)
    assert neutral_of(prompts[0], [concept]).endswith("in the style of an artist")


def test_a_share_of_steps_is_progress_on_both_kinds_of_schedule():
    """The window of TRACE leaves the same number of steps out, whatever the shift of a flow's schedule."""
    import torch

    for steps in (15, 28, 50):
        even = Schedule(torch.arange(steps), torch.arange(steps, dtype=torch.float64) / steps)
        s = 1 - torch.arange(steps, dtype=torch.float64) / steps
        shifted = Schedule(torch.arange(steps), flow_tau(3.16 * s / (1 + 2.16 * s)))
        late = [schedule.first_late(schedule.progress(0.15)) for schedule in (even, shifted)]
        assert late == [-(-15 * steps // 100)] * 2
        assert even.progress(0.0) == shifted.progress(0.0) == 0.0
        assert even.progress(1.0) == 1.0


def test_pairs_of_many_concepts_grow_with_their_number():
    assert _ring(1) == []
    assert _ring(2) == [(0, 1)]
    assert _ring(3) == [(0, 1), (0, 2), (1, 2)]
    assert len(_ring(50)) == 50
    assert all(sum(i in pair for pair in _ring(50)) == 2 for i in range(50))


def test_no_method_is_handed_the_prompts_that_are_measured_on():
    ctx = RunContext(None, (CAT,), Free())
    for split in ("train", "validation"):
        assert isinstance(ctx.prompts("erase", split), list)
    with pytest.raises(ValueError, match="Evaluation prompts are for measuring only"):
        ctx.prompts("erase", "evaluation")
