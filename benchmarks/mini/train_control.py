"""Train what tells mushrooms from everything that the mini models draw: a linear layer on the classifier's features.

Mushrooms are drawn, and taken through both models' VAEs as an attack's images are; the others are what both models draw for
prompts of all four tasks and for words in random order, whole and mixed, so that odd images count as no mushroom too. The
threshold lies half way, in logits, between the likeliest other image of validation and its least likely mushroom but for 1 %.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from erasekit.attacks.draw import Draw
from erasekit.attacks.drawing import images, latents
from erasekit.attacks.target import ErasedModel
from erasekit.evaluation.tasks import Prompt
from erasekit.methods.context import RunContext
from erasekit.registration.plugins import default
from erasekit_mini.control import mushroom
from erasekit_mini.evaluators import MODELS, load_classifier, to_input
from erasekit_mini.tasks import Celebrities, Hazards, Objects, Styles

DRAWN = {"train": 1000, "validation": 300, "evaluation": 300}


def asked(split: str, n: int) -> list[Prompt]:
    """`n` prompts from all over the world, a tenth of them words in random order, which draw odd things."""
    prompts: list[Prompt] = []
    for task in (Objects(), Celebrities(), Styles(), Hazards()):
        concepts = [task.concept(name) for name in task.concepts]
        prompts += [p for which in ("erase", "clean", "synonyms") for p in task.prompts(which, concepts, split)]
        prompts += task.prompts("captions", concepts[:1], split)
    rng = random.Random(f"control/{split}")
    rng.shuffle(prompts)
    words = sorted({word for p in prompts for word in p.text.split()})
    odd = [Prompt(" ".join(rng.sample(words, 6)), rng.randrange(2**31)) for _ in range(n // 10)]
    return [*prompts[: n - len(odd)], *odd]


def drawn(backbone, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Images by a model, uint8, a fifth of them decoded from mixtures of two."""
    model = ErasedModel(RunContext(backbone, (), Objects()), None)
    parts = []
    for i in range(0, len(prompts), 30):
        some = prompts[i : i + 30]
        parts.append(latents(model, Draw(backbone.encode([p.text for p in some]), [p.seed for p in some])))
    x0 = torch.cat(parts)
    fifth = len(x0) // 5
    x0[:fifth] = 0.7 * x0[:fifth] + 0.7 * x0[-fifth:]
    return torch.cat([images(model, x) for x in x0.split(30)])


def rendered(backbones, first: int, n: int) -> torch.Tensor:
    """Mushrooms as they are, and through each VAE, uint8."""
    plain = torch.stack([torch.from_numpy(np.array(mushroom(first + i))).permute(2, 0, 1) for i in range(n)])
    found = [plain]
    for backbone in backbones:
        with torch.no_grad():
            decoded = backbone.decode(backbone.to_latents(to_input(plain)))
        found.append(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(found)


@torch.no_grad()
def features(net, batch: torch.Tensor) -> torch.Tensor:
    """The classifier's features."""
    return torch.cat([net(to_input(part))["features"] for part in batch.split(100)])


def main() -> None:
    """Draw, fit, measure, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=MODELS / "evaluators")
    out = parser.parse_args().out
    net, kinds = load_classifier(MODELS / "evaluators"), [default().backbones.get(n) for n in ("sd15-mini", "flux-mini")]
    backbones = [kind.load(kind.Config(device="cpu")) for kind in kinds]
    data = {}
    for k, (split, n) in enumerate(DRAWN.items()):
        no = torch.cat([drawn(backbone, asked(split, n)) for backbone in backbones])
        data[split] = features(net, rendered(backbones, 10_000 * k, n)), features(net, no)
        print(split, *(len(side) for side in data[split]), flush=True)
    yes, no = data["train"]
    x, y = torch.cat([yes, no]).double(), torch.cat([torch.ones(len(yes)), torch.zeros(len(no))]).double()
    mean, std = x.mean(0), x.std(0) + 1e-3
    w, b = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (x.shape[1], 1))
    optimizer = torch.optim.LBFGS([w, b], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (x - mean) / std @ w + b
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y) + 1e-3 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = (w / std).detach(), (b - (w * mean / std).sum()).detach()
    score = {split: [side.double() @ weight + bias for side in sides] for split, sides in data.items()}
    mine, others = score["validation"]
    logit = (mine.quantile(0.01) + others.max()) / 2
    least = float(logit.sigmoid())
    found = {}
    for split, sides in score.items():
        seen = [float((side.sigmoid() >= least).double().mean()) for side in sides]
        found[split] = dict(zip(("mushrooms", "others"), seen, strict=True)) | {"images": [len(side) for side in sides]}
    save_file({"weight": weight.float(), "bias": bias.float()}, out / "control.safetensors")
    apart = {"mushrooms, 1 %": round(float(mine.quantile(0.01)), 2), "others, most": round(float(others.max()), 2)}
    card = {"version": 1, "threshold": round(least, 4), "logits": apart, "seen": found}
    (out / "control.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
