"""What looks through a CLIP: the whole path of open_clip with weights built here, against the formulas in float64."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation.evaluators import Batch
from erasekit.evaluation.natural.clip10 import CIFAR10, Clip10
from erasekit.evaluation.natural.clip_score import ClipScore
from erasekit.evaluation.natural.styles import TEMPLATES, Styles, StylesProbe
from erasekit.evaluation.tasks import Prompt
from tests.photographs import photograph, seen_by, tensor

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def clip(tiny_clip_folder):
    """The settings that name it, and functions that give its unit vectors in float64 by open_clip itself."""
    net, prepare = open_clip.create_model_from_pretrained(f"local-dir:{tiny_clip_folder}")
    net = net.double().eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{tiny_clip_folder}")

    def unit(vectors):
        return vectors / vectors.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def image(picture):
        return unit(net.encode_image(prepare(picture)[None].double()))[0]

    @torch.no_grad()
    def text(words):
        return unit(net.encode_text(tokenize([words])))[0]

    return {"model": f"local-dir:{tiny_clip_folder}"}, image, text


def test_clip10_is_the_softmax_over_a_hundred_cosines(clip):
    settings, image, text = clip
    judge, picture = Clip10(**settings), photograph("cat")
    cosines = [float(image(picture) @ text(f"a photo of the {name}")) for name in CIFAR10]
    total = sum(math.exp(100 * c) for c in cosines)
    row = seen_by(judge, picture, "cat")
    assert row["score"] == pytest.approx(math.exp(100 * cosines[3]) / total, rel=1e-3)
    assert row["seen"] == [CIFAR10[int(np.argmax(cosines))]]
    assert row["shown"] == (row["seen"] == ["cat"])
    assert seen_by(judge, picture, "unicorn")["shown"] is None
    said = judge.describe()
    assert said["model"] == "CLIP tiny-clip"
    assert said["labels"] == list(CIFAR10)


def test_it_ranks_pictures_by_the_cosine(clip):
    settings, image, text = clip
    names = ("cat", "coffee", "rocket", "flower")
    judge = ClipScore(**settings)
    want = sorted(names, key=lambda n: float(image(photograph(n)) @ text("a cup of coffee")))
    assert sorted(names, key=lambda n: seen_by(judge, photograph(n), text="a cup of coffee")["clip_score"]) == want


def test_the_clip_score_is_a_hundred_cosines_and_not_below_zero(clip):
    settings, image, text = clip
    judge = ClipScore(**settings)
    prompts = ["a cup of coffee", "a cat", "the moon over a lake", "x"]
    rows = [seen_by(judge, photograph("coffee"), text=p) for p in prompts]
    want = [max(0.0, 100 * float(image(photograph("coffee")) @ text(p))) for p in prompts]
    assert [r["clip_score"] for r in rows] == pytest.approx(want, rel=1e-3, abs=1e-3)
    scored = [{"set": which, "clip_score": s} for which, s in (("clean", 20.0), ("clean", 30.0), ("erase", 90.0))]
    ((name, metric),) = judge.metrics_of({"base": scored[:1], "erased": scored}).items()
    assert (name, metric.value, metric.base, metric.n, metric.higher_is_better) == (
        "clip_score[tiny-clip]",
        25.0,
        20.0,
        2,
        True,
    )


def test_numbers_do_not_depend_on_the_batch(clip):
    settings, *_ = clip
    one, many = Clip10(**settings), Clip10(**settings)
    images = torch.cat([tensor(photograph(n).resize((64, 64))) for n in ("cat", "coffee", "rocket")])
    prompts = [Prompt("p", 0, "cat", "erase")] * 3
    many.update(Batch(images, prompts, "base"))
    for i in range(3):
        one.update(Batch(images[i : i + 1], prompts[:1], "base"))
    for a, b in zip(one.compute().rows, many.compute().rows, strict=True):
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)


def test_maces_mean_probabilities(clip):
    settings, *_ = clip
    judge = Clip10(**settings)
    alone = [{"set": "erase", "score": 0.2}, {"set": "erase", "score": 0.4}, {"set": "erase", "score": None}]
    beside = [
        {"set": "preserve", "judge": "imagenet", "score": 0.9, "clip10.score": 0.7},
        {"set": "erase", "judge": "x", "score": 1.0},
    ]
    metrics = judge.metrics_of({"erased": alone + beside, "base": alone[:1]})
    assert metrics["p_e[clip10]"].value == pytest.approx(0.3)
    assert metrics["p_e[clip10]"].base == 0.2
    assert (metrics["p_e[clip10]"].n, metrics["p_s[clip10]"].value) == (2, 0.7)
    assert metrics.keys() == {"p_e[clip10]", "p_s[clip10]"}


def test_styles_are_told_apart_by_the_mean_of_their_texts(clip):
    settings, image, text = clip
    artists, others = ("Monet", "Hokusai", "Klee"), ("a photograph",)
    judge = Styles(**settings, labels=artists, others=others)
    means = [sum(text(t.format(who)) for t in TEMPLATES) for who in artists]
    classes = [m / m.norm() for m in means] + [text(others[0])]
    logits = torch.stack([100 * image(photograph("flower")) @ c for c in classes])
    probability = logits.softmax(0)
    row = seen_by(judge, photograph("flower"), "Klee", text="a flower by Klee")
    assert row["score"] == pytest.approx(float(probability[2]), rel=1e-2)
    best = int(probability.argmax())
    assert row["seen"] == ([artists[best]] if best < 3 else [])
    assert row["style_fit"] == pytest.approx(100 * float(image(photograph("flower")) @ text("a flower by Klee")), rel=1e-3)
    with pytest.raises(UsageError, match="no artists"):
        Styles(**settings)


def test_maces_differences(clip):
    settings, *_ = clip
    judge = Styles(**settings, labels=("Monet",))
    rows = {
        "erased": [
            {"set": "erase", "style_fit": 20.0},
            {"set": "preserve", "style_fit": 29.0},
            {"set": "preserve", "style_fit": 27.0},
        ],
        "base": [{"set": "erase", "style_fit": 30.0}, {"set": "preserve", "style_fit": 29.0}],
    }
    metrics = judge.metrics_of(rows)
    assert {name: (m.value, m.base) for name, m in metrics.items()} == {
        "clip_e[tiny-clip]": (20.0, 30.0),
        "clip_p[tiny-clip]": (28.0, 29.0),
        "h_a[tiny-clip]": (8.0, -1.0),
    }
    assert "h_a[tiny-clip]" not in judge.metrics_of({side: of[:1] for side, of in rows.items()})


@pytest.fixture(scope="module")
def paintings(tmp_path_factory):
    """Pieces of photographs in the place of paintings: of one colour cast each, and some of no cast."""
    folder = tmp_path_factory.mktemp("paintings")
    casts = {"Rosa": (1.0, 0.2, 0.3), "Verde": (0.2, 1.0, 0.3), "_nobody": (1.0, 1.0, 1.0)}
    for who, cast in casts.items():
        (folder / who).mkdir()
        for i, name in enumerate(("cat", "coffee", "motorcycle", "palace", "flower", "astronaut")):
            cast_on(photograph(name), cast).save(folder / who / f"{i}.png")
    return folder, casts


def cast_on(picture: Image.Image, cast) -> Image.Image:
    return Image.fromarray((np.array(picture.resize((96, 96))) * np.array(cast)).astype(np.uint8))


def test_a_probe_learns_the_painters_and_says_how_well(clip, paintings):
    pytest.importorskip("sklearn")
    settings, *_ = clip
    folder, casts = paintings
    judge = StylesProbe(**settings, paintings=str(folder), labels=("Rosa", "Verde"), c=100.0)
    assert judge.labels == ("Rosa", "Verde")
    for who in ("Rosa", "Verde"):
        row = seen_by(judge, cast_on(photograph("rocket"), casts[who]), who)
        assert (row["seen"], row["shown"]) == ([who], True)
    plain = seen_by(judge, cast_on(photograph("cat").crop((100, 0, 400, 300)), casts["_nobody"]), "Rosa")
    assert (plain["seen"], plain["shown"]) == ([], False)
    said = judge.describe()
    assert said["accuracy"].endswith("of 18 paintings, each left out of one of 5 folds")
    assert float(said["accuracy"].split()[0]) > 0.8
    assert str(folder) not in str(said)


def test_what_is_missing_is_one_line(clip, paintings, tmp_path):
    settings, *_ = clip
    folder, _ = paintings
    (tmp_path / "one" / "Rosa").mkdir(parents=True)
    photograph("cat").save(tmp_path / "one" / "Rosa" / "1.png")
    cases = [
        (EnvironmentProblem, "CLIP 'local-dir:", lambda: Clip10(model=f"local-dir:{tmp_path}")),
        (EnvironmentProblem, "Go online once", lambda: Clip10(model="ViT-B-32", pretrained="nobodys")),
        (UsageError, "styles-probe.paintings=FOLDER", lambda: StylesProbe(**settings)),
        (UsageError, "no paintings of Klee", lambda: StylesProbe(**settings, paintings=str(folder), labels=("Klee",))),
        (UsageError, "of one name only", lambda: StylesProbe(**settings, paintings=str(tmp_path / "one"))),
    ]
    for kind, says, make in cases:
        with pytest.raises(kind) as caught:
            make()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_openais_weights_get_the_activation_that_they_were_trained_with(monkeypatch):
    asked = {}

    def create(model, pretrained, **settings):
        asked[pretrained] = settings["force_quick_gelu"]
        raise OSError("offline")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    for tag in ("openai", "laion2b_s34b_b79k"):
        with pytest.raises(EnvironmentProblem, match="offline"):
            ClipScore(pretrained=tag)
    assert asked == {"openai": True, "laion2b_s34b_b79k": False}


def test_evaluators_of_one_clip_share_it(clip):
    settings, *_ = clip
    one, other = Clip10(**settings), ClipScore(**settings)
    assert one._clip is other._clip
    assert one._clip.name == "tiny-clip"
