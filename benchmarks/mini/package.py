"""Copy what was trained into the plugin, in half precision: the pipeline folder and the evaluators' weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import erasekit_mini
from data import WORK

MODELS = Path(erasekit_mini.__file__).parent / "models"


def main() -> None:
    """Replace the shipped models by those in the work folder."""
    shutil.rmtree(MODELS, ignore_errors=True)
    shutil.copytree(WORK / "sd15-mini", MODELS / "sd15-mini")
    for path in (MODELS / "sd15-mini").glob("*/config.json"):  # diffusers notes the folder a part was loaded from
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    target = MODELS / "evaluators"
    target.mkdir()
    shutil.copy(WORK / "evaluators" / "classifier.json", target)
    shutil.copy(WORK / "evaluators" / "renders.safetensors", target)
    for source in (WORK / "evaluators" / "classifier.safetensors", WORK / "image_tower.safetensors"):
        tensors = {
            k: v.half() if v.dtype == torch.float32 else v for k, v in load_file(source).items() if "num_batches" not in k
        }
        save_file(tensors, target / source.name)
    print(f"{sum(f.stat().st_size for f in MODELS.rglob('*') if f.is_file()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
