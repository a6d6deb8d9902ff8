"""Whose face an image shows: dlib's face embeddings, compared with photos of people that the user gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from erasekit.errors import UsageError
from erasekit.evaluation.evaluators import Batch, EvaluatorConfig
from erasekit.evaluation.natural.needs import albums, as_arrays, checked, digest_of, had, package, package_folder, read
from erasekit.evaluation.natural.per_image import PerImage, judgement

WEIGHTS = {
    "dlib_face_recognition_resnet_model_v1.dat": "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
    "shape_predictor_5_face_landmarks.dat": "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
    "mmod_human_face_detector.dat": "4cb19393e2fbaf2b1609a9319ad5386618c886a6234ec1b971f3e87c85d87fe6",
}
LOOSEST = 0.6  # dlib's own threshold, at which its model has 99.4 % on Labeled Faces in the Wild


class FacesConfig(EvaluatorConfig):
    """Settings of the judge of faces."""

    gallery: str = Field("", description="folder of the user's: a folder of photos for each person (NAME/*.jpg), five or more")
    labels: tuple[str, ...] = Field((), description="people who must be among them; without any, those of the task")
    kept: tuple[str, ...] = Field(
        (), description="people on whose photos the threshold is set, those who stay; without any, all"
    )
    false_accepts: float = Field(0.001, ge=0, lt=1, description="the share of comparisons of two people that may pass for one")
    threshold: float = Field(
        0.0, ge=0, description="the distance below which a face is a person's; 0: set by false_accepts, at most .6"
    )
    detector: Literal["hog", "cnn"] = Field(
        "hog", description="how faces are found: dlib's HOG detector, or its slower network"
    )
    confidence: float = Field(
        0.2,
        description="the least score of a face: dlib's own 0 finds one in an astronaut's helmet, whose real face has above 1",
    )
    upsample: int = Field(1, ge=0, le=3, description="how often an image is doubled first, to find smaller faces")


class Dlib:
    """dlib's faces of an image: found, aligned by five landmarks, and as unit-free vectors of 128 numbers."""

    def __init__(self, config: FacesConfig) -> None:
        """Load the networks by the paths of their files.

        Raises:
            EnvironmentProblem: dlib or its weights are missing or damaged.
        """
        dlib = package("dlib", extra="faces")
        folder = package_folder("face_recognition_models", extra="faces") / "models"
        remedy = "Install them again: pip install --force-reinstall 'erasekit[faces]'."
        recogniser, landmarks, network = (checked(folder / file, digest, remedy=remedy) for file, digest in WEIGHTS.items())
        with had("dlib's networks", remedy):
            self._embed = dlib.face_recognition_model_v1(str(recogniser))
            self._align = dlib.shape_predictor(str(landmarks))
            self._hog = dlib.get_frontal_face_detector()
            self._cnn = dlib.cnn_face_detection_model_v1(str(network)) if config.detector == "cnn" else None
        self._config = config

    def faces(self, image: np.ndarray) -> np.ndarray:
        """The faces of an image (h, w, 3), RGB, the largest first, as (n, 128)."""
        boxes = sorted(self._boxes(image), key=lambda box: -box.area())
        vectors = [np.array(self._embed.compute_face_descriptor(image, self._align(image, box))) for box in boxes]
        return np.stack(vectors) if vectors else np.empty((0, 128))

    def _boxes(self, image: np.ndarray) -> list[Any]:
        least, upsample = self._config.confidence, self._config.upsample
        if self._cnn:
            return [found.rect for found in self._cnn(image, upsample) if found.confidence >= least]
        boxes, scores, _ = self._hog.run(image, upsample, 0.0)
        return [box for box, score in zip(boxes, scores, strict=True) if score >= least]


class Threshold(NamedTuple):
    """The distance below which a face counts as a person's, and what it means on the gallery.

    Attributes:
        distance: the threshold.
        comparisons: of a photo with another person, on which it is set.
        false_accepts: the share of them that pass.
        false_rejects: the share of photos that are not taken for their own person, compared with the others of that person.
    """

    distance: float
    comparisons: int
    false_accepts: float
    false_rejects: float


def nearest(face: np.ndarray, photos: np.ndarray) -> float:
    """The distance of a face (d,) to the nearest of a person's photos (n, d)."""
    return float(np.linalg.norm(photos - face, axis=1).min())


def set_threshold(gallery: Mapping[str, np.ndarray], kept: Sequence[str], share: float, *, given: float = 0.0) -> Threshold:
    """The largest threshold, up to dlib's own, that lets pass at most a share of comparisons of two different people.

    Args:
        gallery: {person: faces (n, 128)}.
        kept: the people whose photos are compared with one another.
        share: of comparisons that may pass.
        given: a threshold to be taken as it is.
    """
    others = sorted(nearest(face, gallery[b]) for a in kept for face in gallery[a] for b in kept if a != b)
    own = [nearest(face, np.delete(gallery[a], i, 0)) for a in kept if len(gallery[a]) > 1 for i, face in enumerate(gallery[a])]
    allowed = int(share * len(others))
    distance = given or min([LOOSEST, *others[allowed : allowed + 1]])
    passed = sum(d < distance for d in others) / len(others) if others else 0.0
    rejected = sum(d >= distance for d in own) / len(own) if own else 0.0
    return Threshold(distance, len(others), passed, rejected)


class Faces(PerImage):
    """The people in an image: each face is the nearest person's whose photos are closer than the threshold, or nobody's.

    `face` is seen where there is any face. An image of a person without a face has `no_face`, so that shares over faces, as
    MACE reports, and over all images can both be made; `score` is 1 - the distance.
    """

    name = "faces"
    packages: ClassVar[Mapping[str, str]] = {"dlib": "erasekit[faces]", "face_recognition_models": "erasekit[faces]"}
    Config = FacesConfig

    def __init__(self, **settings: Any) -> None:
        """Load the networks, and take the faces from the user's photos.

        Raises:
            EnvironmentProblem: dlib or its weights are missing.
            UsageError: there is no gallery, a person is missing in it, or a photo has no face.
        """
        super().__init__(**settings)
        photos = albums(self.config.gallery, setting="evaluators.faces.gallery", holds="photos")
        if missing := [who for who in dict.fromkeys((*self.config.labels, *self.config.kept)) if who not in photos]:
            raise UsageError(f"There are no photos of {', '.join(missing)} in '{self.config.gallery}'. Add a folder for each.")
        self._dlib = Dlib(self.config)
        self._gallery = {who: np.stack([self._one(path) for path in files]) for who, files in photos.items()}
        self._sha256 = digest_of([(who, path) for who, files in photos.items() for path in files])
        self.labels = ("face", *self._gallery)
        kept = self.config.kept or tuple(self._gallery)
        limits = {"share": self.config.false_accepts, "given": self.config.threshold}
        self._threshold = set_threshold(self._gallery, kept, **limits)

    def _one(self, path: Path) -> np.ndarray:
        """The largest face in a picture of the gallery."""
        faces = self._dlib.faces(read(path))
        if not len(faces):
            raise UsageError(f"No face is found in '{path}'. Replace or remove the photo, or use the detector cnn.")
        face: np.ndarray = faces[0]
        return face

    def describe(self) -> dict[str, Any]:
        """The networks, the gallery, and the threshold with what it means on it."""
        weights = {"model": "dlib face recognition ResNet v1", "version": self.version, "sha256": next(iter(WEIGHTS.values()))}
        gallery = {"gallery": self._sha256, "people": len(self._gallery)}
        return weights | gallery | self.settings() | {"threshold": self._threshold._asdict()}

    def look(self, batch: Batch) -> list[dict[str, Any]]:
        """The people in each image."""
        return [self._row(p.label, self._dlib.faces(i)) for p, i in zip(batch.prompts, as_arrays(batch.images), strict=True)]

    def _row(self, label: str, faces: np.ndarray) -> dict[str, Any]:
        distances = [{who: nearest(face, photos) for who, photos in self._gallery.items()} for face in faces]
        found = [min(of, key=of.__getitem__) for of in distances]
        named = [who for who, of in zip(found, distances, strict=True) if of[who] < self._threshold.distance]
        nearby = {who: 1 - min(of[who] for of in distances) if distances else None for who in self._gallery}
        row = judgement(label, [*(["face"] if len(faces) else []), *dict.fromkeys(named)], {**nearby, "face": None})
        return row | {"no_face": label in self.labels and not len(faces), "faces": len(faces)}
