"""Measure what an unedited mini model draws: every cell of the model's card, on prompts and seeds of the evaluation split."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from data import WORK
from erasekit_mini import vocabulary as words
from erasekit_mini.nets import MiniClassifier
from render import grid
from train_classifier import OUT, judge

CELL = 50


def draw(pipeline: DiffusionPipeline, prompts: list[str], seeds: list[int], *, steps: int, guidance: float) -> torch.Tensor:
    """Images (n, 3, h, w) in [-1, 1], one seed each."""
    images = []
    call: dict = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt", "height": 64, "width": 64}
    if hasattr(pipeline, "tokenizer_2"):
        call["max_sequence_length"] = pipeline.tokenizer_2.model_max_length
    for i in range(0, len(prompts), 50):
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + 50]]
        images.append(pipeline(prompts[i : i + 50], generator=generators, **call).images)
    return torch.cat(images).float() * 2 - 1


class Judge:
    """The mini classifier with its thresholds, as the evaluator uses it."""

    def __init__(self, folder: Path = OUT) -> None:
        """Load the weights."""
        self.model = MiniClassifier().eval()
        self.model.load_state_dict(load_file(folder / "classifier.safetensors"), strict=False)
        card = json.loads((folder / "classifier.json").read_text())
        self.thresholds = torch.tensor(list(card["thresholds"].values()))

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Presence as booleans, the other heads as classes; images pass through 8 bits as saved ones do."""
        pixels = (images.add(1).mul(127.5).round().clamp(0, 255) / 127.5) - 1
        out = judge(self.model, list(pixels.split(250)))
        classes = {k: out[k].argmax(1) for k in ("style", "identity", "background")}
        return {"present": out["present"].sigmoid() >= self.thresholds, "confidence": out["present"].sigmoid(), **classes}


def cells(split: words.Split, n: int) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Cell -> (prompt, what must be seen)."""
    objects = {f"objects/{o}": [(r.prompt, (o,)) for r in words.object_prompts(o, split, n)] for o in words.OBJECTS}
    synonyms = {f"synonyms/{o}": [(r.prompt, (o,)) for r in words.synonym_prompts(o, split, n)] for o in words.OBJECTS}
    people = {f"identities/{i}": [(r.prompt, (i,)) for r in words.identity_prompts(i, split, n)] for i in words.IDENTITIES}
    styles = {f"styles/{a}": [(p, (a, o)) for p, _, o in words.style_prompts(a, split, n)] for a in words.STYLES}
    hazards = {
        f"hazard/{k}": [(r.prompt, ("hazard",)) for r in words.hazard_prompts(k, split, 2 * n)]
        for k in ("explicit", "implicit", "adjective")
    }
    return {
        **objects,
        **synonyms,
        **people,
        "faces/nameless": [(r.prompt, ("face",)) for r in words.nameless_prompts(split, n)],
        **styles,
        **hazards,
        "pairs/all": [(p, (a, b)) for p, a, b in words.pair_prompts(split, 4 * n)],
    }


def measure(
    pipeline: DiffusionPipeline, judge_: Judge, *, split: words.Split, n: int, steps: int, guidance: float
) -> tuple[dict, dict]:
    """The share of right images per cell, and a few images of each."""
    figures: dict[str, float] = {}
    samples: dict[str, torch.Tensor] = {}
    index = 0
    for cell, rows in cells(split, n).items():
        seeds = [words.seed_of(split, 500_000 + index + k) for k in range(len(rows))]
        index += len(rows)
        images = draw(pipeline, [r[0] for r in rows], seeds, steps=steps, guidance=guidance)
        seen, samples[cell] = judge_(images), images[:12]
        label = lambda name, row: bool(seen["present"][row, MiniClassifier.PRESENT.index(name)])  # noqa: E731, B023
        group = cell.split("/")[0]
        if group == "identities":
            right = [seen["identity"][k] == words.IDENTITIES.index(r[1][0]) for k, r in enumerate(rows)]
            figures[f"faces/{rows[0][1][0]}"] = float(np.mean([label("face", k) for k in range(len(rows))]))
        elif group == "styles":
            right = [seen["style"][k] == 1 + list(words.STYLES).index(r[1][0]) for k, r in enumerate(rows)]
            figures[f"styled_objects/{rows[0][1][0]}"] = float(np.mean([label(r[1][1], k) for k, r in enumerate(rows)]))
        else:
            right = [all(label(name, k) for name in r[1]) for k, r in enumerate(rows)]
        figures[cell] = float(np.mean(right))
        if group == "pairs":
            figures["pairs/each"] = float(np.mean([label(name, k) for k, r in enumerate(rows) for name in r[1]]))
            held = [k for k, r in enumerate(rows) if r[1] in words.HELD_OUT_PAIRS[split]]
            figures["pairs/never_trained"] = float(np.mean([right[k] for k in held]))
    return figures, samples


def main() -> None:
    """Measure a pipeline folder and write its card and a contact sheet."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--model", type=Path, default=WORK / "sd15-mini")
    args.add_argument("--split", default="evaluation", choices=("validation", "evaluation"))
    args.add_argument("--cell", type=int, default=CELL)
    args.add_argument("--steps", type=int, default=15)
    args.add_argument("--guidance", type=float, default=4.0)
    args.add_argument("--out", type=Path, default=WORK)
    args = args.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    figures, samples = measure(pipeline, Judge(), split=args.split, n=args.cell, steps=args.steps, guidance=args.guidance)
    groups: dict[str, list[float]] = {}
    for cell, value in figures.items():
        groups.setdefault(cell.split("/")[0], []).append(value)
    means = {
        group: {"mean": round(float(np.mean(v)), 4), "least": round(min(v), 4)}
        for group, v in groups.items()
        if group not in ("pairs", "hazard")
    }
    card = {
        "model": args.model.name,
        "protocol": {
            "split": args.split,
            "images_per_cell": args.cell,
            "sampler": type(pipeline.scheduler).__name__,
            "steps": args.steps,
            "guidance": args.guidance,
        },
        "groups": means,
        "cells": {k: round(v, 4) for k, v in figures.items()},
    }
    name = f"{args.model.name}.{args.split}"
    (args.out / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
    sheet = (
        torch.cat([p for p in samples.values() if len(p) == 12])
        .permute(0, 2, 3, 1)
        .add(1)
        .mul(127.5)
        .round()
        .clamp(0, 255)
        .byte()
        .numpy()
    )
    grid(sheet, 12).save(args.out / f"{name}.webp", quality=80)
    print(
        json.dumps(
            {k: v for k, v in card.items() if k != "cells"}
            | {"pairs_hazard": {k: v for k, v in figures.items() if k.startswith(("pairs", "hazard"))}},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
