"""Train the mini CLIP: a BPE tokenizer, a text tower (the encoder of the mini models) and an image tower (the scorer)."""

from __future__ import annotations

import argparse
import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from data import WORK, Images
from erasekit_mini.nets import MiniImageTower
from loop import fit

POSITIONS, WIDTH = 32, 128
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-!?"


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer learned from the training captions, in CLIP's format; it can spell any lower-case word."""
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        min_frequency=2,
        initial_alphabet=list(CHARACTERS),
    )
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(captions, trainer)
    folder = WORK / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    for character in CHARACTERS:
        for symbol in (character, character + "</w>"):
            vocabulary.setdefault(symbol, len(vocabulary))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    clip = CLIPTokenizer.from_pretrained(folder, model_max_length=POSITIONS)
    clip.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


class Clip(nn.Module):
    """Both towers and the temperature."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        """A text tower of two layers and an image tower."""
        super().__init__()
        ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            projection_dim=WIDTH,
            hidden_act="quick_gelu",
            **ids,
        )
        self.text = CLIPTextModelWithProjection(config)
        self.image = MiniImageTower(WIDTH)
        self.temperature = nn.Parameter(torch.tensor(2.5))


def main() -> None:
    """Train, measure the zero-shot accuracy on held-out renders, save both towers."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--steps", type=int, default=2500)
    args.add_argument("--threads", type=int, default=1)
    args = args.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    images = Images("train")
    tokenizer = build_tokenizer(images.captions)
    tokenize = lambda texts: torch.tensor(tokenizer(texts, padding="max_length", truncation=True).input_ids)  # noqa: E731
    ids = tokenize(images.captions)
    clip = Clip(tokenizer)
    clip.image.to(memory_format=torch.channels_last)
    print(len(tokenizer), tokenizer.tokenize("a photo of two kitties by Orla Vint, zebra"))

    def loss(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(images), (128,), generator=generator)
        text = F.normalize(clip.text(input_ids=ids[index]).text_embeds, dim=-1)
        logits = clip.temperature.exp().clamp(max=60) * clip.image(images.batch(index)) @ text.T
        same = (ids[index][:, None] == ids[index][None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)  # equal captions are equally right
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("clip", clip, loss, steps=args.steps, lr=2e-3, folder=WORK)
    clip.eval()
    test = Images("test")
    with torch.no_grad():
        from erasekit_mini import vocabulary as words

        names = [f"a photo of {words.article(o)}" for o in words.OBJECTS]
        text = F.normalize(clip.text(input_ids=tokenize(names)).text_embeds, dim=-1)
        images = torch.cat([clip.image(test.batch(i)) for i in torch.arange(len(test)).split(256)])
    present = test.labels["present"]
    single = (present[:, :10].sum(1) == 1) & (present[:, 10] == 0)
    accuracy = ((images @ text.T).argmax(1) == present[:, :10].argmax(1))[single].float().mean()
    print(f"zero-shot accuracy on {int(single.sum())} held-out renders of one object: {accuracy:.3f}")
    clip.text.save_pretrained(WORK / "text_encoder")
    save_file({k: v.contiguous() for k, v in clip.image.state_dict().items()}, WORK / "image_tower.safetensors")


if __name__ == "__main__":
    main()
