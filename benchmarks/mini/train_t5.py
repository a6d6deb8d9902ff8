"""Train the T5 encoder of `flux-mini`: a word vocabulary, and an encoder that learns from the mini CLIP's image tower."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from data import WORK, Images
from erasekit_mini.nets import MiniImageTower
from loop import fit
from train_clip import CHARACTERS
from train_clip import WIDTH as IMAGE_WIDTH

POSITIONS, WIDTH = 24, 96


def build_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """A T5 tokenizer whose pieces are the words of the captions, as written and in lower case, and single characters."""
    counts = Counter(word for c in captions for word in re.findall(r"\w+|[^\w\s]", c))
    total = sum(counts.values())
    pieces = {f"▁{word}": math.log(n / total) for word, n in counts.items()}
    for word in list(counts):
        pieces.setdefault(f"▁{word.lower()}", pieces[f"▁{word}"])
    pieces |= {"▁": -6.0} | dict.fromkeys(CHARACTERS + CHARACTERS[:26].upper(), -14.0)
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces.items()], extra_ids=0)
    tokenizer.model_max_length = POSITIONS
    tokenizer.save_pretrained(WORK / "tokenizer_2")
    return T5TokenizerFast.from_pretrained(WORK / "tokenizer_2")


class Student(nn.Module):
    """The encoder with a projection of its mean token into the image tower's space."""

    def __init__(self, vocabulary: int) -> None:
        """Two layers."""
        super().__init__()
        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=vocabulary,
                d_model=WIDTH,
                d_kv=24,
                num_heads=4,
                d_ff=2 * WIDTH,
                num_layers=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
                tie_word_embeddings=False,
            )
        )
        self.projection = nn.Linear(WIDTH, IMAGE_WIDTH)
        self.temperature = nn.Parameter(torch.tensor(2.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Unit vectors (b, width of the image tower) of token ids (b, positions)."""
        return F.normalize(self.projection(self.encoder(ids)[0].mean(1)), dim=-1)


@torch.no_grad()
def image_features(images: Images) -> torch.Tensor:
    """Unit vectors of all images by the frozen image tower."""
    tower = MiniImageTower(IMAGE_WIDTH).eval().to(memory_format=torch.channels_last)
    tower.load_state_dict(load_file(WORK / "image_tower.safetensors"))
    return torch.cat([tower(images.batch(i)) for i in torch.arange(len(images)).split(256)])


def main() -> None:
    """Train with the contrastive loss of CLIP, the image's side frozen, and print the zero-shot accuracy."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--steps", type=int, default=3000)
    args.add_argument("--threads", type=int, default=1)
    args = args.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    images = Images("train")
    tokenizer = build_tokenizer(images.captions)
    tokenize = lambda texts: tokenizer(texts, padding="max_length", max_length=POSITIONS, truncation=True).input_ids  # noqa: E731
    as_written, lowered = (torch.tensor(tokenize(texts)) for texts in (images.captions, [c.lower() for c in images.captions]))
    features = image_features(images)
    student = Student(len(tokenizer))

    def loss(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(images), (128,), generator=generator)
        low = torch.rand(128, 1, generator=generator) < 0.2
        text = student(torch.where(low, lowered[index], as_written[index]))
        logits = student.temperature.exp().clamp(max=60) * features[index] @ text.T
        same = (as_written[index][:, None] == as_written[index][None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("t5", student, loss, steps=args.steps, lr=2e-3, folder=WORK)
    student.eval()
    test = Images("test")
    from erasekit_mini import vocabulary as words

    with torch.no_grad():
        text = student(torch.tensor(tokenize([f"a photo of {words.article(o)}" for o in words.OBJECTS])))
        present = test.labels["present"]
        single = (present[:, :10].sum(1) == 1) & (present[:, 10] == 0)
        accuracy = ((image_features(test) @ text.T).argmax(1) == present[:, :10].argmax(1))[single].float().mean()
    print(f"zero-shot accuracy on {int(single.sum())} held-out renders of one object: {accuracy:.3f}")
    student.encoder.save_pretrained(WORK / "text_encoder_2")


if __name__ == "__main__":
    main()
