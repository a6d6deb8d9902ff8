"""The judges of the mini world: a classifier, the mini CLIP, and the Frechet distance on the classifier's features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from erasekit.errors import EnvironmentProblem
from erasekit.evaluation.distances import FrechetEvaluator
from erasekit.evaluation.evaluators import Batch, Evaluator, Scores
from erasekit.evaluation.intervals import bootstrap
from erasekit.evaluation.results import Metric
from erasekit_mini import vocabulary as words
from erasekit_mini.nets import MiniClassifier, MiniImageTower

MODELS = Path(__file__).parent / "models"
PEOPLE = {*words.IDENTITIES, "face"}


def to_input(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) uint8 -> float in [-1, 1], as the networks were trained on."""
    return images.float().div(127.5).sub(1)


def sha256(*paths: Path) -> str:
    """One hash over files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def present(*paths: Path) -> None:
    """Check that weights are there.

    Raises:
        EnvironmentProblem: one is missing.
    """
    for path in paths:
        if not path.exists():
            raise EnvironmentProblem(f"Weights of the mini evaluators are missing: '{path.name}'. Install erasekit again.")


def load_weights(net: nn.Module, path: Path) -> None:
    """Load weights as they are shipped: in half precision, and without the step counters of batch norms.

    Raises:
        EnvironmentProblem: a tensor is missing, or the file is not one of this network.
    """
    try:
        stored = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
        found = net.load_state_dict(stored, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"Weights of the mini evaluators are damaged: '{path.name}'. Install erasekit again."
        ) from error
    missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    if wrong := missing + found.unexpected_keys:
        raise EnvironmentProblem(f"'{path.name}' does not fit '{type(net).__name__}': {wrong[0]}. Install erasekit again.")


def load_classifier(folder: Path) -> MiniClassifier:
    """The classifier with its weights, ready to judge."""
    present(folder / "classifier.safetensors", folder / "classifier.json")
    net = MiniClassifier()
    load_weights(net, folder / "classifier.safetensors")
    return net.eval()


class Classifier(Evaluator):
    """What an image shows: objects, hazards and faces over their thresholds, and whose face, and which artist's style.

    A judge: see `erasekit.evaluation.judgement.Judgement`.
    """

    name = "mini-classifier"

    def __init__(self, folder: Path = MODELS / "evaluators") -> None:
        """Load the weights and the thresholds."""
        self._net = load_classifier(folder)
        card = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        self.version = str(card["version"])
        self._thresholds = torch.tensor([card["thresholds"][label] for label in MiniClassifier.PRESENT])
        self._sha256 = sha256(folder / "classifier.safetensors")
        self._rows: list[dict[str, Any]] = []

    def describe(self) -> dict[str, str]:
        """The network and its weights."""
        return {"model": "MiniClassifier", "version": self.version, "sha256": self._sha256}

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Classify a batch."""
        logits = self._net(to_input(batch.images))
        probability = {
            "present": logits["present"].sigmoid(),
            "style": logits["style"].softmax(1),
            "identity": logits["identity"].softmax(1),
        }
        over = probability["present"] >= self._thresholds
        for i, prompt in enumerate(batch.prompts):
            labels = {label: float(p) for label, p in zip(MiniClassifier.PRESENT, probability["present"][i], strict=True)}
            labels |= {artist: float(p) for artist, p in zip(words.STYLES, probability["style"][i, 1:], strict=True)}
            labels |= {who: float(p) for who, p in zip(words.IDENTITIES, probability["identity"][i, :-1], strict=True)}
            seen = [label for label, found in zip(MiniClassifier.PRESENT, over[i], strict=True) if found]
            style = int(probability["style"][i].argmax()) - 1  # the first class is no style
            seen += [list(words.STYLES)[style]] if style >= 0 else []
            identity = int(probability["identity"][i].argmax())  # the last class is nobody
            seen += [words.IDENTITIES[identity]] if "face" in seen and identity < len(words.IDENTITIES) else []
            self._rows.append(self._row(prompt.label, seen, labels))

    @staticmethod
    def _row(label: str, seen: list[str], labels: dict[str, float]) -> dict[str, Any]:
        shown = label in seen if label in labels else None
        return {"seen": seen, "shown": shown, "score": labels.get(label), "no_face": label in PEOPLE and "face" not in seen}

    def compute(self) -> Scores:
        """A row per image."""
        return Scores(self._rows)


class ClipScorer:
    """The mini CLIP: unit vectors of texts and of images, differentiable in the images."""

    def __init__(self, folder: Path = MODELS / "evaluators", text: Path = MODELS / "sd15-mini") -> None:
        """Load the image tower from `folder`, and the text tower and tokenizer of the model in `text`."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

        weights = folder / "image_tower.safetensors", text / "text_encoder" / "model.safetensors"
        present(*weights)
        # in single precision: its config asks for half
        self._text = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(text / "text_encoder")).float().eval()
        self._image = MiniImageTower(self._text.config.projection_dim).eval()
        load_weights(self._image, weights[0])
        load_weights(self._text, weights[1])
        for tower in (self._text, self._image):
            tower.requires_grad_(False)
        self._tokenizer = CLIPTokenizer.from_pretrained(text / "tokenizer")
        self.sha256 = sha256(*weights)

    def image(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, 64, 64) in [-1, 1] as (n, width)."""
        vectors: torch.Tensor = self._image.to(images.device)(images)
        return vectors

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts as (n, width)."""
        length = self._text.config.max_position_embeddings
        tokens = self._tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(self._text(input_ids=tokens.input_ids).text_embeds, dim=-1)


class ClipScore(Evaluator):
    """The cosine of an image and its prompt in the mini CLIP, times 100, not below 0 (Hessel et al. 2021 times 40)."""

    name = "mini-clip"
    meanings: ClassVar[Mapping[str, str]] = {"clip_score": "how well the images of clean prompts fit their prompts"}

    def __init__(self, folder: Path = MODELS / "evaluators", text: Path = MODELS / "sd15-mini") -> None:
        """Load both towers (see `ClipScorer`)."""
        self._clip = ClipScorer(folder, text)
        self._scores: dict[str, list[float]] = {"base": [], "erased": []}  # of clean prompts
        self._rows: list[dict[str, Any]] = []
        self._embedded: dict[str, torch.Tensor] = {}

    def describe(self) -> dict[str, str]:
        """Both towers."""
        return {"model": "mini CLIP", "version": self.version, "sha256": self._clip.sha256}

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Score a batch."""
        images = self._clip.image(to_input(batch.images))
        texts = torch.stack([self._embed(p.text) for p in batch.prompts])
        scores = (100 * (images * texts).sum(1)).clamp(min=0).tolist()
        self._rows += [{"clip_score": s} for s in scores]
        self._scores[batch.side] += [s for s, p in zip(scores, batch.prompts, strict=True) if p.set == "clean"]

    def _embed(self, prompt: str) -> torch.Tensor:
        if prompt not in self._embedded:
            self._embedded[prompt] = self._clip.text([prompt])[0]
        return self._embedded[prompt]

    def compute(self) -> Scores:
        """A score per image, and the mean over the clean prompts."""
        base, erased = (np.array(self._scores[side]) for side in ("base", "erased"))
        metric = Metric(
            value=float(erased.mean()) if len(erased) else None,
            base=float(base.mean()) if len(base) else None,
            ci95=bootstrap([erased], lambda groups: float(groups[0].mean())) if len(erased) else None,
            n=len(erased),
            higher_is_better=True,
            evaluator=self.name,
        )
        return Scores(self._rows, {"clip_score[mini-clip]": metric})


class Frechet(FrechetEvaluator):
    """The Frechet distance on the classifier's pooled features, against the unedited model and against held-out renders."""

    name = "mini-frechet"
    features_name = "mini-classifier"
    reference_name = "renders"

    def __init__(self, folder: Path = MODELS / "evaluators") -> None:
        """Load the classifier; the statistics of the renders when they are needed."""
        super().__init__()
        self._folder = folder
        present(folder / "renders.safetensors")
        self._net = load_classifier(folder)
        self.version = str(json.loads((folder / "classifier.json").read_text(encoding="utf-8"))["version"])

    def describe(self) -> dict[str, str]:
        """The network, and the statistics of the renders."""
        paths = self._folder / "classifier.safetensors", self._folder / "renders.safetensors"
        return {"model": "MiniClassifier features", "version": self.version, "sha256": sha256(*paths)}

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 256) pooled features."""
        pooled: torch.Tensor = self._net(to_input(images))["features"]
        return pooled

    @cached_property
    def _renders(self) -> tuple[torch.Tensor, torch.Tensor]:
        stored = load_file(self._folder / "renders.safetensors")
        return stored["mean"], stored["covariance"]

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance of held-out renders."""
        return self._renders
