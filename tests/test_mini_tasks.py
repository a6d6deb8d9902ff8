import json
import re
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation.evaluators import Batch
from erasekit.evaluation.intervals import bootstrap
from erasekit.evaluation.tasks import Prompt
from erasekit.testing import tiny
from erasekit_mini import vocabulary as words
from erasekit_mini.evaluators import Classifier, ClipScore, Frechet
from erasekit_mini.nets import MiniClassifier, MiniImageTower
from erasekit_mini.tasks import Celebrities, Hazards, Objects, Styles

TASKS = (Objects(), Celebrities(), Styles(), Hazards())
OBJECTS = TASKS[0]


def shown(which: str, label: str, flags: list[int], **more) -> list[dict]:
    return [{"set": which, "label": label, "shown": bool(f), "seen": [label] if f else []} | more for f in flags]


def rows(erased: list[dict], base: list[dict] | None = None) -> dict[str, list[dict]]:
    return {"erased": erased, "base": base or [r | {"shown": True, "seen": [r["label"]]} for r in erased]}


# Concepts ------------------------------------------------------------------------------------------------------------


def test_a_concept_is_completed_with_articles_and_what_to_preserve():
    concept = OBJECTS.concept("airplane:plane,aircraft,the jet")
    assert concept.phrases == ("an airplane", "a plane", "an aircraft", "the jet")
    assert concept.kind == "object"
    assert concept.neutral == "a background"
    assert set(concept.templates) == set(words.FRAMES["train"])
    assert "a dog" in concept.preserve
    assert len(concept.preserve) == 9


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_every_declared_concept_is_known(task):
    for name in task.concepts:
        concept = task.concept(name)
        assert concept.name == name
        assert not set(concept.phrases) & set(concept.preserve)
        assert all(t.count("{}") == 1 for t in concept.templates)


def test_an_unknown_concept_names_the_nearest():
    with pytest.raises(UsageError, match=r"Unknown concept 'horsse'\. Did you mean 'horse'"):
        OBJECTS.concept("horsse")
    with pytest.raises(UsageError, match="Ada Brooks"):
        TASKS[1].concept("ada broks")
    assert TASKS[1].concept("ada brooks").name == "Ada Brooks"


def test_the_stand_in_says_that_it_is_one():
    assert "stand-in" in TASKS[3].title
    assert TASKS[3].blurred


# Prompts -------------------------------------------------------------------------------------------------------------


def count(concepts, split="evaluation", limit=None) -> dict[str, int]:
    sets = ("erase", "synonyms", "preserve", "clean", "pairs")
    return {which: len(OBJECTS.prompts(which, concepts, split, limit)) for which in sets}


def test_sizes_of_the_sets():
    cat, three = [OBJECTS.concept("cat")], [OBJECTS.concept(n) for n in ("cat", "dog", "ship")]
    assert count(cat) == {"erase": 50, "synonyms": 50, "preserve": 180, "clean": 100, "pairs": 0}
    assert count(three) == {"erase": 150, "synonyms": 150, "preserve": 140, "clean": 100, "pairs": 50}
    assert count(three, limit=4) == {"erase": 12, "synonyms": 12, "preserve": 4, "clean": 4, "pairs": 4}
    with pytest.raises(UsageError, match="prompt set"):
        OBJECTS.prompts("eraze", cat, "evaluation")


def test_a_short_set_holds_as_many_things_as_it_can():
    cat = [OBJECTS.concept("cat")]
    assert len({p.label for p in OBJECTS.prompts("preserve", cat, "evaluation", 9)}) == 9


def test_prompts_say_what_they_are():
    three = [OBJECTS.concept(n) for n in ("cat", "dog", "ship")]
    for prompt in OBJECTS.prompts("erase", three, "evaluation"):
        assert prompt.set == "erase"
        assert prompt.concept == prompt.label
        assert prompt.label in prompt.text
    synonyms = OBJECTS.prompts("synonyms", three, "evaluation")
    assert not [p for p in synonyms if f" a {p.label} " in f" {p.text} "]
    assert any("two kittens" in p.text for p in synonyms)
    assert {p.label for p in OBJECTS.prompts("preserve", three, "evaluation")} == set(words.OBJECTS) - {"cat", "dog", "ship"}
    for prompt in OBJECTS.prompts("pairs", three, "evaluation"):
        first, second = prompt.label.split("+")
        assert {first, second} <= {"cat", "dog", "ship"}
        assert first in prompt.text
        assert second in prompt.text


SPLITS = ("train", "validation", "evaluation")


def halves(phrases):
    """The words told to methods, and those that are measured."""
    return [set(words.told(phrases, split)) for split in ("train", "evaluation")]


def test_evaluation_asks_in_words_that_training_and_validation_never_say():
    """acc_g and the hazards that are only evoked are measured on words that were told to nobody."""
    for name, own in words.OBJECTS.items():
        told, measured = halves(own[1:])
        assert told
        assert measured
        texts = {split: _said(OBJECTS, "synonyms", name, split) for split in ("train", "validation", "evaluation")}
        assert not any({w, words.plural(w)} & texts["evaluation"] for w in told)
        assert not any({w, words.plural(w)} & (texts["train"] | texts["validation"]) for w in measured)
    hazards = TASKS[3]
    told, everything = set(words.HAZARD_TOLD), {*words.HAZARD_IMPLICIT, *words.HAZARD_ADJECTIVES}
    prompts = {split: [p.text for p in hazards.prompts("erase", [hazards.concept("hazard")], split)] for split in SPLITS}
    assert told < everything
    assert not any(re.search(rf"\b{w}\b", text) for w in told for text in prompts["evaluation"])
    assert not any(re.search(rf"\b{w}\b", text) for w in everything - told for text in prompts["train"] + prompts["validation"])
    assert {w for w in everything - told if any(w in text for text in prompts["evaluation"])} == everything - told


def _said(task, which, name, split):
    return {word for p in task.prompts(which, [task.concept(name)], split) for word in p.text.split()}


def test_the_kind_of_a_hazard_prompt_is_read_off_its_words():
    for kind in get_args(words.HazardKind):
        for split in SPLITS:
            assert {words.hazard_kind(row.prompt) for row in words.hazard_prompts(kind, split, 60)} == {kind}


def test_a_prompt_says_what_it_is_without_the_concept():
    hazards, cat = TASKS[3], OBJECTS.concept("cat")
    found = {p.text: p.neutral for p in OBJECTS.prompts("synonyms", [cat], "train")}
    assert found["a photo of a kitty"] == "a photo of a background"
    found = {p.text: p.neutral for p in hazards.prompts("erase", [hazards.concept("hazard")], "train")}
    assert found["danger"] == "a background"
    assert found["a threatening airplane"] == "a airplane"
    assert not any(p.neutral for p in OBJECTS.prompts("erase", [cat], "evaluation"))


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_clean_prompts_and_captions_say_no_word_of_what_is_erased(task):
    name = task.concepts[0]
    concepts = [task.concept(name)]
    clean, captions = task.prompts("clean", concepts, "evaluation"), task.prompts("captions", concepts, "train")
    assert len(clean) == 100
    assert len(captions) == 1000
    assert len({p.text for p in captions}) == 1000
    forbidden = {w.lower() for w in task.words_of(name)}
    for prompt in (*clean, *captions):
        assert not [w for w in forbidden if f" {w} " in f" {prompt.text.lower()} "]
    assert task.prompts("captions", concepts, "evaluation") == []


def test_captions_are_of_the_whole_world():
    captions = [p.text for p in OBJECTS.prompts("captions", [OBJECTS.concept("cat")], "train")]
    for word in ("dog", "puppy", "two ", "Ada Brooks", "by Orla Vint", "bomb", "violen", " and a ", "nothing"):
        assert any(word in c for c in captions), word


def test_a_prompt_keeps_its_seed_whatever_else_is_erased():
    cat, two = [OBJECTS.concept("cat")], [OBJECTS.concept("cat"), OBJECTS.concept("dog")]
    for which in ("erase", "synonyms", "preserve", "clean"):
        one = {p.text: p.seed for p in OBJECTS.prompts(which, cat, "evaluation")}
        other = {p.text: p.seed for p in OBJECTS.prompts(which, two, "evaluation")}
        both = one.keys() & other.keys()
        assert len(both) > 40
        assert all(one[t] == other[t] for t in both)


# Metrics -------------------------------------------------------------------------------------------------------------


def test_metrics_of_objects_against_their_definition():
    erased = shown("erase", "cat", [1, 0, 0, 0]) + shown("synonyms", "cat", [1, 1, 0, 0, 0])
    erased += shown("preserve", "dog", [1] * 3) + shown("preserve", "ship", [1, 0]) + shown("clean", "dog", [0] * 9)
    found = OBJECTS.aggregate(rows(erased), [OBJECTS.concept("cat")])
    assert set(found) == {"acc_e", "acc_s", "acc_g", "h_o", "acc_pairs"}
    assert found["acc_pairs"].value is None  # nobody asked for pairs: `evaluate` leaves it out
    assert found["acc_e"].value == 0.25
    assert found["acc_g"].value == pytest.approx(0.4)
    assert found["acc_s"].value == 0.75  # the mean over classes, not 4 of 5
    assert found["h_o"].value == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.6))
    assert [found[m].base for m in ("acc_e", "acc_s", "acc_g")] == [1.0, 1.0, 1.0]
    assert found["h_o"].base == 0.0  # the unedited model erases nothing
    assert [found[m].n for m in ("acc_e", "acc_s", "acc_g", "h_o")] == [4, 5, 5, 14]
    assert found["acc_e"].ci95[0] < 0.25 < found["acc_e"].ci95[1]
    assert found["h_o"].ci95[0] <= found["h_o"].value <= found["h_o"].ci95[1]
    assert [found[m].higher_is_better for m in ("acc_e", "acc_s", "acc_g", "h_o")] == [False, True, False, True]


def test_several_concepts_count_alike():
    erased = shown("erase", "cat", [1]) + shown("erase", "dog", [0] * 9) + shown("synonyms", "cat", [0])
    erased += shown("synonyms", "dog", [0]) + shown("preserve", "ship", [1])
    erased += shown("pairs", "cat+dog", [0, 0], seen=["cat", "ship"]) + shown("pairs", "dog+cat", [0], seen=[])
    found = OBJECTS.aggregate(rows(erased), [OBJECTS.concept("cat"), OBJECTS.concept("dog")])
    assert found["acc_e"].value == 0.5
    assert found["acc_pairs"].value == pytest.approx(2 / 6)
    assert found["acc_pairs"].n == 6


def test_a_perfect_and_a_useless_erasure():
    perfect = shown("erase", "cat", [0]) + shown("synonyms", "cat", [0]) + shown("preserve", "dog", [1])
    useless = [r | {"shown": True} for r in perfect]
    assert OBJECTS.aggregate(rows(perfect), [OBJECTS.concept("cat")])["h_o"].value == 1.0
    assert OBJECTS.aggregate(rows(useless), [OBJECTS.concept("cat")])["h_o"].value == 0.0


def test_the_interval_of_the_harmonic_mean_is_near_a_bootstrap_and_keeps_its_width():
    sizes = {"erase": (60, 12), "synonyms": (60, 18), "preserve": (80, 64)}
    groups = {which: np.array([1.0] * k + [0.0] * (n - k)) for which, (n, k) in sizes.items()}
    erased = [r for which, flags in groups.items() for r in shown(which, "cat" if which != "preserve" else "dog", flags)]
    found = OBJECTS.aggregate(rows(erased), [OBJECTS.concept("cat")])["h_o"]

    def statistic(drawn) -> float:
        return 3 / (1 / (1 - drawn[0].mean()) + 1 / (1 - drawn[1].mean()) + 1 / drawn[2].mean())

    assert found.ci95 == pytest.approx(bootstrap(list(groups.values()), statistic, draws=4000), abs=0.015)
    perfect = shown("erase", "cat", [0] * 50) + shown("synonyms", "cat", [0] * 50) + shown("preserve", "dog", [1] * 180)
    found = OBJECTS.aggregate(rows(perfect), [OBJECTS.concept("cat")])["h_o"]
    assert found.value == found.ci95[1] == 1.0
    assert 0.95 < found.ci95[0] < 0.98


def test_without_images_there_is_no_number():
    found = OBJECTS.aggregate(rows(shown("erase", "cat", [0])), [OBJECTS.concept("cat")])
    assert found["acc_e"].value == 0.0
    assert found["acc_g"].value is None
    assert found["acc_g"].ci95 is None
    assert found["h_o"].value is None


def test_names_of_the_other_tasks_metrics():
    people, styles, hazards = TASKS[1:]
    erased = shown("erase", "Ada Brooks", [0, 1], seen=["face"]) + shown("preserve", "Ben Carter", [1, 1])
    found = people.aggregate(rows(erased), [people.concept("Ada Brooks")])
    assert {k: found[k].value for k in found} == pytest.approx({"acc_e": 0.5, "acc_s": 1.0, "h_c": 2 / 3, "face_rate": 1.0})
    erased = shown("erase", "Orla Vint", [0, 0, 1, 0]) + shown("preserve", "Nika Sol", [1])
    found = styles.aggregate(rows(erased), [styles.concept("Orla Vint")])
    assert {k: found[k].value for k in found} == pytest.approx(
        {"acc_e": 0.25, "style_removed": 0.75, "acc_s": 1.0, "h_s": 6 / 7}
    )
    assert found["style_removed"].ci95 == pytest.approx(tuple(1 - end for end in found["acc_e"].ci95[::-1]))
    asked = ["a photo of a gun", "danger", "a deadly threat on the grass", "a deadly truck"]
    erased = shown("erase", "hazard", [0, 0, 1, 0]) + shown("preserve", "cat", [1])
    erased = [row | {"prompt": text} for row, text in zip(erased, [*asked, "a cat"], strict=True)]
    found = hazards.aggregate(rows(erased), [hazards.concept("hazard")])
    expected = {"unsafe_images": 0.25, "unsafe_detections": 1.0, "acc_s": 1.0, "h_n": 6 / 7}
    expected |= {"unsafe_images[explicit]": 0.0, "unsafe_images[implicit]": 0.5, "unsafe_images[adjective]": 0.0}
    assert {k: found[k].value for k in found} == pytest.approx(expected)
    assert found["unsafe_detections"].base == 4.0


# Evaluators, with weights drawn at random ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of all mini evaluators, and a model folder with the text side of the mini CLIP."""
    path = tmp_path_factory.mktemp("evaluators")
    torch.manual_seed(0)
    net, tower = MiniClassifier(), MiniImageTower(tiny.WIDTH)
    for name, module in (("classifier", net), ("image_tower", tower)):
        half = {k: v.half() for k, v in module.state_dict().items() if "num_batches" not in k}
        save_file(half, path / f"{name}.safetensors")
    card = {"version": 7, "thresholds": dict.fromkeys(MiniClassifier.PRESENT, 0.5), "accuracy": {}}
    (path / "classifier.json").write_text(json.dumps(card))
    save_file({"mean": torch.zeros(256), "covariance": torch.eye(256)}, path / "renders.safetensors")
    tokens = tiny.tokenizer(path / "tokenizer")
    sizes = {"hidden_size": tiny.WIDTH, "intermediate_size": 64, "projection_dim": tiny.WIDTH}
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": tiny.LENGTH}
    CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(tokens), **sizes, **ids, **shape)).save_pretrained(
        path / "text_encoder"
    )
    return path


def batch(n: int = 6, side: str = "base", seed: int = 0) -> Batch:
    images = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    labels = ("cat", "empty", "Ada Brooks", "Orla Vint", "face", "cat+dog")
    return Batch(images, [Prompt(f"a {x}", i, x, "clean") for i, x in enumerate(labels[:n])], side)


def test_presence_is_the_threshold_and_nothing_else(folder):
    judge = Classifier(folder)
    judge.update(batch())
    with torch.no_grad():
        net = MiniClassifier()
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in judge._net.state_dict().items()})
        logits = net.eval()(batch().images.float() / 127.5 - 1)
    found = judge.compute().rows
    for row, present, style, identity in zip(found, logits["present"], logits["style"], logits["identity"], strict=True):
        expected = {x for x, logit in zip(MiniClassifier.PRESENT, present, strict=True) if logit >= 0}  # sigmoid(0) = 0.5
        if int(style.argmax()):
            expected.add(list(words.STYLES)[int(style.argmax()) - 1])
        if "face" in expected and int(identity.argmax()) < len(words.IDENTITIES):
            expected.add(words.IDENTITIES[int(identity.argmax())])
        assert set(row["seen"]) == expected
    assert [r["shown"] is None for r in found] == [False, True, False, False, False, True]
    assert [r["no_face"] for r in found] == [
        label in ("Ada Brooks", "face") and "face" not in r["seen"]
        for label, r in zip(("cat", "empty", "Ada Brooks", "Orla Vint", "face", "cat+dog"), found, strict=True)
    ]
    assert found[0]["score"] == pytest.approx(float(logits["present"][0, list(MiniClassifier.PRESENT).index("cat")].sigmoid()))
    assert judge.tag == "mini-classifier@7"
    assert len(judge.describe()["sha256"]) == 64


def test_a_threshold_of_one_sees_nothing(folder, tmp_path):
    for name in ("classifier.safetensors", "classifier.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    card = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps(card | {"thresholds": dict.fromkeys(card["thresholds"], 1.01)}))
    judge = Classifier(tmp_path)
    judge.update(batch())
    assert not {x for row in judge.compute().rows for x in row["seen"]} & {*words.OBJECTS, "hazard", "face", *words.IDENTITIES}


def test_the_clip_score_is_a_cosine_per_image(folder):
    scorer = ClipScore(folder, folder)
    scorer.update(batch(3))
    scorer.update(batch(3, "erased", 1))
    scores = [r["clip_score"] for r in scorer.compute().rows]
    assert len(scores) == 6
    assert all(0 <= s <= 100 for s in scores)
    metric = scorer.compute().metrics["clip_score[mini-clip]"]
    assert metric.base == pytest.approx(np.mean(scores[:3]))
    assert metric.value == pytest.approx(np.mean(scores[3:]))
    assert metric.ci95[0] <= metric.value <= metric.ci95[1]
    with torch.no_grad():  # an independent path: one image, one prompt, cosine by hand
        ids = scorer._clip._tokenizer(["a cat"], padding="max_length", max_length=tiny.LENGTH, return_tensors="pt").input_ids
        text = scorer._clip._text(input_ids=ids).text_embeds[0].double()
        image = scorer._clip._image(batch().images[:1].float() / 127.5 - 1)[0].double()
    cosine = float(text @ image / text.norm() / image.norm())
    assert scores[0] == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)


def test_a_long_prompt_is_cut_as_the_model_cuts_it(folder):
    scorer = ClipScore(folder, folder)
    scorer.update(Batch(batch(1).images, [Prompt("a cat " * 50, 0, "", "clean")], "base"))
    assert len(scorer.compute().rows) == 1


def test_frechet_against_the_base_and_against_renders(folder):
    judge = Frechet(folder)
    judge.update(batch())
    judge.update(batch(side="erased"))
    metrics = judge.compute().metrics
    assert metrics["frechet[mini-classifier]"].value == pytest.approx(0.0, abs=1e-6)
    renders = metrics["frechet[mini-classifier/renders]"]
    assert renders.value == pytest.approx(renders.base)
    assert renders.value > 0
    assert renders.evaluator == "mini-frechet"


def test_a_text_tower_without_its_projection_is_refused(folder, tmp_path):
    for file in folder.rglob("*.*"):
        (tmp_path / file.relative_to(folder)).parent.mkdir(exist_ok=True)
        (tmp_path / file.relative_to(folder)).write_bytes(file.read_bytes())
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "text_encoder" / "model.safetensors")
    with pytest.raises(EnvironmentProblem, match="text_projection"):
        ClipScore(tmp_path, tmp_path)


def test_damaged_weights_are_one_line(folder, tmp_path):
    for name in ("classifier.safetensors", "classifier.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:-100])
    with pytest.raises(EnvironmentProblem, match="damaged"):
        Classifier(tmp_path)


@pytest.mark.parametrize("make", [Classifier, lambda folder: ClipScore(folder, folder), Frechet])
def test_missing_weights_are_one_line(make, tmp_path):
    with pytest.raises(EnvironmentProblem, match="Install erasekit again"):
        make(tmp_path)
