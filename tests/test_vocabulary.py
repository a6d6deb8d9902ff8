"""The three splits of the mini world's wordings share no prompt and no seed."""

import itertools
import re

import pytest

from erasekit.evaluation.tasks import PROMPT_SETS, SPLITS, seed_offset
from erasekit_mini import vocabulary as words
from erasekit_mini.tasks import PER_CONCEPT, Celebrities, Hazards, Objects, Styles

TASKS = (Objects(), Celebrities(), Styles(), Hazards())


def everything(split: str) -> set[str]:
    """Every prompt that the vocabulary can make for a split."""
    most = 100_000
    texts = [r.prompt for r in words.clean_prompts(split, most) + words.nameless_prompts(split, most)]
    for name in words.OBJECTS:
        texts += [r.prompt for r in words.object_prompts(name, split, most) + words.synonym_prompts(name, split, most)]
    texts += [r.prompt for name in words.IDENTITIES for r in words.identity_prompts(name, split, most)]
    texts += [p for artist in words.STYLES for p, _, _ in words.style_prompts(artist, split, most)]
    texts += [r.prompt for kind in ("explicit", "implicit", "adjective") for r in words.hazard_prompts(kind, split, most)]
    texts += [p for p, _, _ in words.pair_prompts(split, 2000)]
    return set(texts)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SPLITS, 2)))
def test_no_prompt_is_in_two_splits(one, other):
    assert len(everything(one)) > 1000
    assert not everything(one) & everything(other)


@pytest.mark.parametrize("frames", [words.FRAMES, words.STYLE_FRAMES, words.PORTRAIT_FRAMES])
def test_no_frame_is_in_two_splits(frames):
    assert set(frames) == set(SPLITS)
    every = [frame for split in SPLITS for frame in frames[split]]
    assert len(set(every)) == len(every)


def test_no_evaluation_prompt_stands_in_a_training_wording():
    """Whatever the phrase: no training frame fits around the words of an evaluation prompt, but for the bare phrase."""
    phrases = [words.article(w) for names in words.OBJECTS.values() for w in names]
    evaluation = {f.format(p) for f in words.FRAMES["evaluation"] for p in phrases}
    training = {f.format(p) for f in words.FRAMES["train"] for p in phrases}
    assert not evaluation & training
    for frame in words.FRAMES["train"]:
        if frame != "{}":
            wording = re.compile(re.escape(frame).replace(r"\{\}", f"(?:{'|'.join(phrases)})"))
            assert not [p for p in evaluation if wording.fullmatch(p)]


def test_held_out_pairs_belong_to_one_split_each():
    pairs = [frozenset(p) for split in SPLITS for p in words.HELD_OUT_PAIRS[split]]
    assert len(set(pairs)) == len(pairs)
    assert {o for pair in pairs for o in pair} <= set(words.OBJECTS)
    first = {frozenset((a, b)) for _, a, b in words.pair_prompts("evaluation", 5)}
    assert first == {frozenset(p) for p in words.HELD_OUT_PAIRS["evaluation"]}


def test_seeds_of_the_splits_never_meet():
    highest = max(map(seed_offset, PROMPT_SETS)) + PER_CONCEPT * 100
    ranges = [range(words.seed_of(s, 0), words.seed_of(s, highest) + 1) for s in SPLITS]
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_tasks_draw_different_prompts_and_seeds_in_every_split(task):
    concepts = [task.concept(task.concepts[0])]
    drawn = {s: [p for which in PROMPT_SETS for p in task.prompts(which, concepts, s)] for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {p.text for p in drawn[one]} & {p.text for p in drawn[other]}
        assert not {p.seed for p in drawn[one]} & {p.seed for p in drawn[other]}
    for prompts in drawn.values():
        assert len({p.seed for p in prompts}) == len(prompts)


def test_articles_and_plurals():
    assert words.article("airplane") == "an airplane"
    assert words.article("cat") == "a cat"
    assert [words.plural(w) for w in ("cat", "kitty", "deer", "aircraft")] == ["cats", "kitties", "deer", "aircraft"]
