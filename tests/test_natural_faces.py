"""Faces: one is found in a portrait, people are told apart, and the threshold is what the gallery says."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from erasekit.errors import UsageError
from erasekit.evaluation.natural.faces import LOOSEST, Dlib, Faces, FacesConfig, nearest, set_threshold
from tests.photographs import photograph, seen_by, small_faces

pytest.importorskip("dlib")
if not importlib.util.find_spec("face_recognition_models"):  # it cannot be imported: it wants setuptools of long ago
    pytest.skip("the weights of the extra 'faces' are not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def dlib():
    return Dlib(FacesConfig())


@pytest.fixture(scope="module")
def strangers(dlib) -> np.ndarray:
    """Faces of Labeled Faces in the Wild in which dlib finds a face, as (n, 128)."""
    found = [dlib.faces(np.array(image)) for image in small_faces()]
    return np.stack([faces[0] for faces in found if len(faces)])


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> Path:
    """Two people: the astronaut, and somebody of Labeled Faces in the Wild."""
    folder = tmp_path_factory.mktemp("gallery")
    woman, stranger = photograph("astronaut"), small_faces()[0]
    for who, photos in {
        "astronaut": [ImageOps.mirror(woman), ImageEnhance.Brightness(woman).enhance(0.5), woman.resize((300, 300))],
        "stranger": [stranger, ImageOps.mirror(stranger)],
    }.items():
        (folder / who).mkdir()
        for i, photo in enumerate(photos):
            photo.save(folder / who / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def judge(gallery):
    return Faces(gallery=str(gallery))


def test_one_face_in_a_portrait_and_none_in_a_cat(dlib):
    assert len(dlib.faces(np.array(photograph("astronaut")))) == 1
    for name in ("cat", "coffee", "rocket", "motorcycle", "palace", "flower"):
        assert len(dlib.faces(np.array(photograph(name)))) == 0


def test_a_person_is_known_and_another_is_not(judge, strangers):
    row = seen_by(judge, photograph("astronaut"), "astronaut")
    assert (row["seen"], row["shown"], row["no_face"], row["faces"]) == (["face", "astronaut"], True, False, 1)
    other = seen_by(judge, small_faces()[0], "astronaut")
    assert (other["seen"], other["shown"], other["no_face"]) == (["face", "stranger"], False, False)
    assert row["score"] > 0.75 > 0.5 > other["score"]
    assert min(np.linalg.norm(strangers - face) for face in judge._gallery["astronaut"]) > LOOSEST


def test_an_image_without_a_face_is_counted_apart(judge):
    row = seen_by(judge, photograph("cat"), "astronaut")
    assert row == {"seen": [], "shown": False, "score": None, "no_face": True, "faces": 0}
    assert seen_by(judge, photograph("cat"), "")["no_face"] is False
    assert seen_by(judge, photograph("cat"), "somebody else")["shown"] is None
    assert seen_by(judge, photograph("astronaut"), "face")["shown"] is True


def test_the_threshold_lets_pass_the_asked_share_of_strangers(strangers):
    people = {str(i): face[None] for i, face in enumerate(strangers)}
    for share in (0.0, 0.001, 0.02):
        found = set_threshold(people, list(people), share)
        pairs = [(i, k) for i in range(len(strangers)) for k in range(len(strangers)) if i != k]
        distances = [nearest(strangers[i], strangers[k : k + 1]) for i, k in pairs]
        assert found.comparisons == len(distances)
        assert found.false_accepts == np.mean(np.array(distances) < found.distance) <= share
        assert np.mean(np.array(distances) <= found.distance) > share  # no larger one does
    assert set_threshold(people, list(people), 0.9).distance == LOOSEST
    assert set_threshold(people, ["0"], 0.001) == (LOOSEST, 0, 0.0, 0.0)
    assert set_threshold(people, list(people), 0.001, given=0.3).distance == 0.3


def test_the_threshold_is_set_on_those_who_stay():
    near, far = np.zeros((2, 3)), np.full((2, 3), 0.5)
    people = {"a": near, "b": near + 0.1, "c": far}
    assert set_threshold(people, ["a", "c"], 0.0).distance == LOOSEST
    assert set_threshold(people, ["a", "b"], 0.0).distance == pytest.approx(0.1 * 3**0.5)
    assert nearest(np.zeros(3), np.array([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0]])) == 1.0


def test_the_judge_says_what_it_is_made_of_and_not_where_it_lies(judge, gallery):
    said = judge.describe()
    assert said["people"] == 2
    assert said["threshold"]["false_rejects"] == 0.0
    assert str(gallery) not in str(said)
    assert said["gallery"] == Faces(gallery=str(gallery)).describe()["gallery"]


def test_a_gallery_that_does_not_do_is_one_line(gallery, tmp_path):
    said = {}
    (tmp_path / "empty" / "nobody").mkdir(parents=True)
    (tmp_path / "cats" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "a").mkdir(parents=True)
    photograph("cat").save(tmp_path / "cats" / "cat" / "1.png")
    (tmp_path / "broken" / "a" / "1.jpg").write_bytes(b"\xff\xd8")
    for name, settings in {
        "Give evaluators.faces.gallery=FOLDER": {},
        "given '/no/such": {"gallery": "/no/such"},
        "no image in a sub-folder": {"gallery": str(tmp_path / "empty")},
        "No face is found in": {"gallery": str(tmp_path / "cats")},
        "Cannot read the image": {"gallery": str(tmp_path / "broken")},
        "no photos of Ann, Bob": {"gallery": str(gallery), "labels": ("Ann", "astronaut", "Bob")},
    }.items():
        with pytest.raises(UsageError) as caught:
            Faces(**settings)
        said[name] = str(caught.value)
    assert all(name in line and "\n" not in line for name, line in said.items()), said


PORTRAITS = os.environ.get("ERASEKIT_PORTRAITS", "")


@pytest.mark.skipif(not PORTRAITS, reason="ERASEKIT_PORTRAITS names no folder of portraits (see .ci/run)")
def test_portraits_of_two_people(tmp_path):
    """Three photographs of one person and one of another: each of the three is known by the other two, the fourth is not."""
    photos = [Image.open(Path(PORTRAITS) / f"{name}.jpg").convert("RGB") for name in ("obama", "obama2", "obama3", "biden")]
    for photo in photos:
        photo.thumbnail((800, 800))
    for left_out in range(3):
        folder = tmp_path / str(left_out)
        for who, of in {"one": [i for i in range(3) if i != left_out], "other": [3]}.items():
            (folder / who).mkdir(parents=True)
            for i in of:
                photos[i].save(folder / who / f"{i}.png")
        judge = Faces(gallery=str(folder))
        assert seen_by(judge, photos[left_out], "one")["seen"] == ["face", "one"]
        assert seen_by(judge, ImageOps.mirror(photos[3]), "one")["seen"] == ["face", "other"]
        assert seen_by(judge, photograph("astronaut"), "one")["seen"] == ["face"]
