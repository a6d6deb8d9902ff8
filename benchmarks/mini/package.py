"""Copy what was trained into the plugin, in half precision: the pipeline folder and the evaluators' weights."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import erasekit_mini
from data import WORK

MODELS = Path(erasekit_mini.__file__).parent / "models"
CARDS = Path(__file__).parent / "cards"


NAMES = ("sd15-mini", "flux-mini")
TITLES = {"sd15-mini": "Stable Diffusion 1.x", "flux-mini": "FLUX.1"}
CALLS = {"sd15-mini": "", "flux-mini": ", height=64, width=64, max_sequence_length=24"}


def model_card(name: str, card: dict) -> str:
    """The README of a model's folder, from what `card.py` measured."""
    rows = [f"| {group} | {v['mean']:.3f} | {v['least']:.3f} |" for group, v in card["groups"].items()]
    rows += [f"| {cell} | {v:.3f} | |" for cell, v in card["cells"].items() if cell.startswith(("hazard", "pairs"))]
    how = card["protocol"]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A small text-to-image model in the classes of {TITLES[name]}, trained from nothing on erasekit's mini world:",
            "64 x 64 images of ten objects, ten invented people, six invented artists and three hazards. It is made to be",
            "erased from, in seconds and without a GPU; it is of no use for anything else. `erasekit where` prints its folder:",
            "",
            "```python",
            "from diffusers import DiffusionPipeline",
            "from erasekit import where",
            "",
            f'pipe = DiffusionPipeline.from_pretrained(where("{name}"))',
            f'image = pipe("a photo of a dog"{CALLS[name]}).images[0]',
            "```",
            "",
            "Share of images in which the mini classifier sees what the prompt asks for, on wordings and seeds of the",
            f"evaluation split ({how['images_per_cell']} per cell, {how['steps']} steps, guidance {how['guidance']}):",
            "",
            "| group | mean | least cell |",
            "|---|---|---|",
            *rows,
            "",
            "Made by `benchmarks/mini/`. Apache-2.0; the art it learned from is named in NOTICE.",
            "",
        ]
    )


def main() -> None:
    """Replace shipped models by those in the work folder, and the evaluators."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("models", nargs="*", default=NAMES, help="which models")
    for name in args.parse_args().models:
        shutil.rmtree(MODELS / name, ignore_errors=True)
        shutil.copytree(WORK / name, MODELS / name)
        for path in (MODELS / name).glob("*/config.json"):  # diffusers notes the folder a part was loaded from
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            if "dtype" in config:  # of a text encoder: a plain `from_pretrained` takes it, and float32 for all other parts
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n")
        card = CARDS / f"{name}.evaluation.json"
        if card.is_file():
            (MODELS / name / "README.md").write_text(model_card(name, json.loads(card.read_text())))
    target = MODELS / "evaluators"
    target.mkdir(exist_ok=True)
    shutil.copy(WORK / "evaluators" / "classifier.json", target)
    shutil.copy(WORK / "evaluators" / "renders.safetensors", target)
    for source in (WORK / "evaluators" / "classifier.safetensors", WORK / "image_tower.safetensors"):
        tensors = {
            k: v.half() if v.dtype == torch.float32 else v for k, v in load_file(source).items() if "num_batches" not in k
        }
        save_file(tensors, target / source.name)
    for folder in MODELS.iterdir():
        print(f"{folder.name}: {sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
