"""Train what tells mushrooms from everything that the mini models draw: a linear layer on the classifier's features.

Mushrooms are drawn, and taken through both models' VAEs as an attack's images are; the others are what both models draw for
training captions, whole and at random mixtures, so that odd images count as no mushroom too. The threshold is the least one
with no false alarm on images for validation prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from erasekit.attacks.draw import Draw
from erasekit.attacks.drawing import images, latents
from erasekit.attacks.target import ErasedModel
from erasekit.methods.context import RunContext
from erasekit.registration.plugins import default
from erasekit_mini.control import mushroom
from erasekit_mini.evaluators import MODELS, load_classifier, to_input
from erasekit_mini.tasks import Objects

DRAWN = {"train": 400, "validation": 150, "evaluation": 150}


def drawn(backbone, split: str, n: int) -> torch.Tensor:
    """Images of the world by a model, uint8, a third of them decoded from mixtures of two."""
    task = Objects()
    sets = ("captions", "erase", "preserve") if split == "train" else ("erase", "synonyms", "clean")
    prompts = [p for which in sets for p in task.prompts(which, [task.concept("cat")], split)]
    prompts = prompts[:: max(1, len(prompts) // n)][:n]
    model = ErasedModel(RunContext(backbone, (), task), None)
    parts = []
    for i in range(0, len(prompts), 30):
        some = prompts[i : i + 30]
        parts.append(latents(model, Draw(backbone.encode([p.text for p in some]), [p.seed for p in some])))
    x0 = torch.cat(parts)
    third = len(x0) // 3
    x0[:third] = 0.7 * x0[:third] + 0.7 * x0[-third:]
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
        no = torch.cat([drawn(backbone, split, n) for backbone in backbones])
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
    score = {split: [(side.double() @ weight + bias).sigmoid() for side in sides] for split, sides in data.items()}
    least = max(0.5, float(score["validation"][1].max()) + 1e-3)
    found = {}
    for split, sides in score.items():
        seen = [float((side >= least).double().mean()) for side in sides]
        found[split] = dict(zip(("mushrooms", "others"), seen, strict=True)) | {"images": [len(side) for side in sides]}
    save_file({"weight": weight.float(), "bias": bias.float()}, out / "control.safetensors")
    card = {"version": 1, "threshold": round(least, 4), "seen": found}
    (out / "control.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
