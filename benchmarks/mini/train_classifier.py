"""Train the classifier that judges images of the mini world, and measure it on held-out renders.

Half of every batch are renders, half are what the autoencoder makes of renders, some of both blurred or noisy: generated
images come through the same decoder, and must be judged fairly.
"""

from __future__ import annotations

import argparse
import json

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch.nn import functional as F

from data import WORK, Images
from erasekit_mini.nets import MiniClassifier
from loop import fit

OUT = WORK / "evaluators"


def reconstruct(vae: AutoencoderTiny, images: Images, index: torch.Tensor) -> torch.Tensor:
    """Images after a round trip through the autoencoder, as int8."""
    with torch.no_grad():
        parts = [vae.decode(vae.encode(images.batch(i)).latents).sample for i in index.split(200)]
    return torch.cat([(p.clamp(-1, 1) * 127).to(torch.int8) for p in parts])


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A third of the images softened, a third with mild noise, all shifted by up to two pixels."""
    kind = torch.rand(len(x), generator=generator)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = x + 0.08 * torch.randn(x.shape, generator=generator)
    x = torch.where((kind < 0.33)[:, None, None, None], soft, torch.where((kind > 0.67)[:, None, None, None], noisy, x))
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return F.pad(x, (2, 2, 2, 2), mode="replicate")[:, :, 2 + dy : 66 + dy, 2 + dx : 66 + dx].contiguous(
        memory_format=torch.channels_last
    )


def judge(model: MiniClassifier, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of the classifier over all batches."""
    with torch.no_grad():
        outputs = [model(x) for x in batches]
    return {k: torch.cat([o[k] for o in outputs]) for k in outputs[0]}


def accuracy(out: dict[str, torch.Tensor], labels: dict[str, torch.Tensor], thresholds: torch.Tensor) -> dict[str, float]:
    """Held-out figures of the card: plain, styled and paired objects, hazard, face, identity, style, background."""
    shown = out["present"].sigmoid() >= thresholds
    truth = labels["present"] > 0
    plain, n_objects = labels["style"] == 0, truth[:, :10].sum(1)
    person = labels["identity"] >= 0
    # an object counts as recognised if it is reported, and an object that is not there must not be
    recall = lambda rows: (shown & truth)[rows][:, :10].sum().item() / truth[rows][:, :10].sum().item()  # noqa: E731
    alarms = (shown & ~truth)[:, :10].sum().item() / (~truth)[:, :10].sum().item()
    both = (shown & truth)[:, :10].sum(1) == 2
    same = lambda head, rows: (out[head].argmax(1) == labels[head])[rows].float().mean().item()  # noqa: E731
    agree = lambda k: (shown[:, k] == truth[:, k]).float().mean().item()  # noqa: E731
    return {
        "objects": recall((n_objects == 1) & plain),
        "objects_styled": recall((n_objects == 1) & ~plain),
        "both_of_pair": both[(n_objects == 2) & plain].float().mean().item(),
        "false_alarms_per_label": alarms,
        "hazard": agree(10),
        "face": agree(11),
        "identity": same("identity", person & plain),
        "identity_styled": same("identity", person & ~plain),
        "style": same("style", torch.ones_like(plain)),
        "background": same("background", plain),
    }


def main() -> None:
    """Train, choose thresholds on one half of the test renders, measure on the other half, save."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--steps", type=int, default=1800)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--reconstructions", type=int, default=8000)
    args = args.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    images, test = Images("train"), Images("test")
    vae = AutoencoderTiny.from_pretrained(WORK / "vae").eval()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: args.reconstructions]
    rebuilt = reconstruct(vae, images, chosen)
    model = MiniClassifier().to(memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> torch.Tensor:
        plain = torch.randint(len(images), (32,), generator=generator)
        k = torch.randint(len(chosen), (32,), generator=generator)
        x = augment(torch.cat([images.batch(plain), rebuilt[k].float() / 127]), generator)
        labels = {name: value[torch.cat([plain, chosen[k]])] for name, value in images.labels.items()}
        out = model(x)
        parts = 3 * F.binary_cross_entropy_with_logits(out["present"], labels["present"])
        parts = parts + F.cross_entropy(out["style"], labels["style"])
        parts = parts + F.cross_entropy(out["identity"], labels["identity"], ignore_index=-1)
        return parts + 0.3 * F.cross_entropy(out["background"], labels["background"])

    model = fit("classifier", model, loss, steps=args.steps, lr=3e-3, weight_decay=0.02, ema_decay=0.995, folder=WORK)
    half = len(test) // 2
    sources = {
        "renders": [test.batch(i) for i in torch.arange(len(test)).split(250)],
        "reconstructions": list((reconstruct(vae, test, torch.arange(len(test))).float() / 127).split(250)),
    }
    outputs = {name: judge(model, batches) for name, batches in sources.items()}
    thresholds = choose_thresholds(outputs["reconstructions"]["present"][:half], test.labels["present"][:half])
    second = {k: v[half:] for k, v in test.labels.items()}
    figures = {
        n: {k: round(v, 4) for k, v in accuracy({k: v[half:] for k, v in o.items()}, second, thresholds).items()}
        for n, o in outputs.items()
    }
    OUT.mkdir(exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items() if "num_batches" not in k}, OUT / "classifier.safetensors"
    )
    labels = dict(zip(MiniClassifier.PRESENT, thresholds.tolist(), strict=True))
    card = {"version": 1, "thresholds": labels, "held_out": figures, "held_out_images": len(test) - half}
    (OUT / "classifier.json").write_text(json.dumps(card, indent=1))
    features = outputs["renders"]["features"].double()
    statistics = {"mean": features.mean(0), "covariance": features.T.cov(), "count": torch.tensor(len(features))}
    save_file(statistics, OUT / "renders.safetensors")
    print(json.dumps(card, indent=1))


def choose_thresholds(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Per label, the threshold in [.3, .7] with the highest balanced accuracy on validation renders."""
    grid = torch.arange(0.3, 0.71, 0.05)
    best = []
    for k in range(truth.shape[1]):
        shown = logits[:, k].sigmoid()[:, None] >= grid
        present = truth[:, k, None] > 0
        balanced = (shown & present).sum(0) / present.sum() + (~shown & ~present).sum(0) / (~present).sum()
        ties = (balanced == balanced.max()).nonzero().flatten()
        best.append(grid[ties[len(ties) // 2]])
    return torch.stack(best)


if __name__ == "__main__":
    main()
