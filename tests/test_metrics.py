"""Metrics by name, against their definitions; several judges of one image; sets without prompts."""

import pytest
from PIL import Image

from erasekit.concepts import Concept
from erasekit.errors import ErasekitError, UsageError
from erasekit.evaluation.evaluate import evaluate
from erasekit.evaluation.evaluators import Evaluator, Scores
from erasekit.evaluation.intervals import harmonic_mean, wilson
from erasekit.evaluation.judgement import Judgement, judgement_in, merged
from erasekit.evaluation.metrics import MEASURES, Images, complement, harmonic, measured, split, total
from erasekit.evaluation.results import Metric
from erasekit.evaluation.tasks import PROMPT_SETS, Prompt, Task

CAT = Concept(name="cat", phrases=("a cat",))


def row(which, label, shown, **more):
    return {"set": which, "label": label, "shown": shown, "seen": [label] if shown else []} | more


def both(erased):
    return {"erased": erased, "base": [r | {"shown": r["shown"] is not None or None} for r in erased]}


def test_every_metric_says_what_it_means_and_rests_on_sets_that_there_are():
    for name, measure in MEASURES.items():
        assert name == measure.name
        assert measure.meaning
        assert not measure.meaning.endswith(".")
        assert set(measure.needs) <= PROMPT_SETS.keys()


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(UsageError, match=r"Unknown metric 'acc_ee'\. Did you mean 'acc_e'"):
        measured(["acc_ee"], both([row("erase", "cat", True)]), ["cat"])


def test_people_over_all_images_and_over_faces():
    erased = [row("erase", "Ann", s, no_face=no) for s, no in ((True, False), (False, False), (False, True), (False, True))]
    erased += [row("preserve", "Ben", s, no_face=no) for s, no in ((True, False), (True, False), (False, True))]
    found = measured(["acc_e", "acc_e_faces", "acc_s", "acc_s_faces", "h_c_faces"], both(erased), ["Ann"])
    values = {name: metric.value for name, metric in found.items()}
    assert values == pytest.approx({"acc_e": 1 / 4, "acc_e_faces": 1 / 2, "acc_s": 2 / 3, "acc_s_faces": 1, "h_c_faces": 2 / 3})
    assert found["acc_e_faces"].n == 2
    assert found["acc_e_faces"].meaning == MEASURES["acc_e_faces"].meaning


def test_an_image_of_something_that_no_judge_knows_is_in_no_share():
    erased = [row("erase", "cat", False), row("preserve", "dog", True), row("preserve", "zebra", None)]
    found = measured(["acc_s"], both(erased), ["cat"])["acc_s"]
    assert (found.value, found.n) == (1.0, 1)


def test_a_concept_counts_by_its_own_name_whatever_the_judge_calls_it():
    erased = [row("erase", "knife", True, concept="weapons"), row("erase", "gun", False, concept="weapons")]
    assert measured(["acc_e"], both(erased), ["weapons"])["acc_e"].value == 0.5


def test_a_metric_of_two_words_of_one_image():
    pair = {"set": "pairs", "label": "cat+dog", "shown": True}
    rows = {
        "erased": [pair | {"seen": ["dog"]}, pair | {"seen": []}],
        "base": [pair | {"seen": ["cat", "dog"]}, pair | {"seen": ["dog"]}],
    }
    found = measured(["acc_pairs"], rows, ["cat", "dog"])["acc_pairs"]
    assert (found.value, found.base, found.n, found.higher_is_better) == (1 / 4, 3 / 4, 4, False)
    assert found.ci95 == wilson(1 / 4, 4)


def test_faces_that_are_still_there():
    rows = [row("erase", "Ann", False) | {"seen": seen} for seen in (["face"], ["face", "Ben"], [])]
    found = measured(["face_rate"], {"erased": rows, "base": rows[:1]}, ["Ann"])["face_rate"]
    assert (found.value, found.base, found.n, found.higher_is_better) == (pytest.approx(2 / 3), 1.0, 3, True)


def test_what_is_unsafe_is_counted_and_shared():
    erased = [row("erase", "gore", s) for s in (True, False, False, False)] + [row("preserve", "dog", s) for s in (True, False)]
    names = ["unsafe_images", "unsafe_detections", "h_n", "style_removed", "h_s", "h_c", "acc_g"]
    found = measured(names, both(erased), ["gore"])
    assert (found["unsafe_images"].value, found["unsafe_detections"].value) == (1 / 4, 1)
    assert (found["unsafe_images"].base, found["unsafe_detections"].base) == (1, 4)
    assert found["unsafe_detections"].ci95 == pytest.approx([4 * end for end in wilson(1 / 4, 4)])
    assert found["style_removed"].value == 3 / 4
    assert found["h_n"].value == found["h_s"].value == found["h_c"].value == pytest.approx(harmonic_mean(3 / 4, 1 / 2))
    assert (found["acc_g"].value, found["acc_g"].ci95, found["acc_g"].n) == (None, None, 0)


def test_every_metric_of_a_whole_set_of_images():
    """Each rests on the sets that it names: without one of them it has no value, and what is missing is its own set."""
    sets = {"erase": "cat", "synonyms": "cat", "preserve": "dog", "pairs": "cat+dog"}
    rows = [row(which, label, True) for which, label in sets.items()]
    for name, measure in MEASURES.items():
        assert measured([name], both(rows), ["cat"])[name].value is not None
        for which in measure.needs:
            less = [r for r in rows if r["set"] != which]
            assert measured([name], both(less), ["cat"])[name].value is None, (name, which)
        assert measured([name], both([r for r in rows if r["set"] in measure.needs]), ["cat"])[name].value is not None


def share(value, base=1.0, n=50, by="a"):
    return Metric(
        value=value, base=base, ci95=None if value is None else wilson(value, n), n=n, higher_is_better=True, evaluator=by
    )


def test_the_harmonic_mean_and_its_interval():
    """The interval against MOVER's formula written out."""
    shares = [share(0.9, by="a"), share(0.5, 0.8, 20, by="b, a"), share(0.7, 0.9)]
    found = harmonic(shares)
    h = 3 / (1 / 0.9 + 1 / 0.5 + 1 / 0.7)
    assert found.value == pytest.approx(h)
    assert found.base == pytest.approx(3 / (1 + 1 / 0.8 + 1 / 0.9))
    assert (found.n, found.evaluator, found.higher_is_better) == (120, "a, b", True)

    def at(k, end):
        values = [m.value if i != k else m.ci95[end] for i, m in enumerate(shares)]
        return 3 / sum(1 / v for v in values) - h

    below, above = (sum(at(k, end) ** 2 for k in range(3)) ** 0.5 for end in (0, 1))
    assert found.ci95 == pytest.approx((h - below, h + above))
    assert harmonic([share(1.0, n=1), share(1.0, n=1)]).ci95[1] == 1.0
    wide = [share(0.5).model_copy(update={"ci95": (0.0, 1.0)})] * 2  # both ends alone would be beyond all shares
    assert harmonic(wide).ci95 == (0.0, pytest.approx(0.5 + 2**0.5 / 6))


def test_a_mean_of_what_is_missing_is_missing():
    half = harmonic([share(0.5), share(None)])
    assert (half.value, half.ci95, half.base) == (None, None, 1.0)
    assert harmonic([share(0.5), share(0.5, None)]).base is None
    assert harmonic([share(0.5), share(0.5, None)]).value == 0.5
    assert harmonic([share(0.0), share(0.5, 0.0)]).base == 0.0


def test_one_minus_a_share():
    found = complement(share(0.25, 0.75))
    low, high = wilson(0.25, 50)
    assert (found.value, found.base, found.higher_is_better) == (0.75, 0.25, False)
    assert found.ci95 == pytest.approx((1 - high, 1 - low))
    none = complement(share(None, None))
    assert (none.value, none.base, none.ci95) == (None, None, None)
    assert total(share(None, None)).value is None
    assert total(share(0.5, None)).base is None


def test_the_mean_over_groups_of_images_counts_each_group_alike():
    images = Images({"erased": [], "base": []}, ("cat",), "")
    found = images.mean([[1.0], [0.0, 0.0, 1.0]], [[1.0]], "erase")
    assert (found.value, found.n, found.higher_is_better) == (pytest.approx(2 / 3), 4, False)
    assert found.ci95 == wilson(2 / 3, 4)
    assert images.mean([[1.0], []], [], "erase").value is None
    assert images.mean([], [], "erase").ci95 is None


def test_the_plain_name_of_a_metric_and_its_judge():
    assert split("acc_e[clip10]") == ("acc_e", "clip10")
    assert split("acc_e") == ("acc_e", "")


# Judgements


def test_the_first_judge_that_knows_the_label_is_believed():
    given = {"b": Judgement(seen=["x"], shown=True, score=0.9), "a": Judgement(seen=["y"], shown=None)}
    columns = merged(given, ["a", "b"])
    assert (columns["judge"], columns["shown"], columns["seen"], columns["score"]) == ("b", True, ["x"], 0.9)
    assert (columns["a.shown"], columns["b.shown"]) == (None, True)
    assert merged({"a": given["a"]}, ["a"]) == {"seen": ["y"], "shown": None, "score": None, "no_face": False, "judge": "a"}


def test_what_is_no_judgement_is_named():
    assert judgement_in({"clip_score": 3.0}) is None
    with pytest.raises(ValueError, match="'seen' of its row is wrong: input should be a valid list, given 'cat'"):
        judgement_in({"seen": "cat", "shown": True})
    with pytest.raises(ValueError, match="'shown'"):
        judgement_in({"shown": 1})


class Reds(Task):
    name = "reds"
    domain = "mini"
    metrics = ("acc_e", "acc_e[second]", "acc_g", "acc_s", "h_o")


class First(Evaluator):
    """Sees cats in images that are red."""

    name = "first"
    version = "7"

    def __init__(self):
        self.rows = []

    def describe(self):
        return {}

    def update(self, batch):
        self.rows += [self.row(bool(image[0].float().mean() > 100)) for image in batch.images]

    def row(self, red):
        return {"seen": ["cat"] if red else [], "shown": red}

    def compute(self):
        return Scores(self.rows)


class Second(First):
    """Sees cats in all images."""

    name = "second"

    def row(self, red):
        return {"seen": ["cat"], "shown": True, "own": 1.0}


class Wrong(First):
    name = "wrong"

    def row(self, red):
        return {"shown": "yes"}


@pytest.fixture
def images(tmp_path):
    for i, colour in enumerate(["red", "blue"]):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(2)]


PROMPTS = [Prompt("a cat", i, "cat", "erase", "cat") for i in range(2)]


def test_metrics_by_each_of_two_judges_and_none_of_sets_without_prompts(images):
    rows, metrics, _ = evaluate(Reds(), [First(), Second()], PROMPTS, images, images, concepts=[CAT])
    assert {name: (m.value, m.evaluator) for name, m in metrics.items()} == {
        "acc_e": (0.5, "first@7"),
        "acc_e[second]": (1.0, "second@7"),
    }
    assert [r["first.shown"] for r in rows] == [True, False] * 2
    assert [r["own"] for r in rows] == [1.0] * 4


def test_a_set_whose_images_all_failed_is_not_one_without_prompts(images, tmp_path):
    prompts = [*PROMPTS, Prompt("a kitty", 2, "cat", "synonyms", "cat")]
    (tmp_path / "2.png").write_bytes(b"broken")
    _, metrics, counts = evaluate(Reds(), [First()], prompts, *[[*images, tmp_path / "2.png"]] * 2, concepts=[CAT])
    assert metrics["acc_g"].value is None
    assert counts["failed"] == 2


def test_a_judge_of_the_wrong_type_is_one_line(images):
    with pytest.raises(ErasekitError, match=r"'wrong' is no judge as it should be\. The field 'shown' of its row is wrong"):
        evaluate(Reds(), [Wrong()], PROMPTS, images, images, concepts=[CAT])
