"""A folder with one LoRA file that diffusers finds without being told its name."""

from __future__ import annotations

import json

import torch

from erasekit.erasures import tensors
from erasekit.erasures.exporting import Exported, Exporter, Order

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for


class LoraFolder(Exporter):
    """The concepts as one LoRA, loaded by `pipe.load_lora_weights(folder)`."""

    suffix = "-lora"

    def write(self, order: Order) -> Exported:
        """Write the folder, or the file alone if a name with an ending is given."""
        path = order.out if order.out.suffix else order.out / WEIGHTS
        path.parent.mkdir(parents=True, exist_ok=True)
        written = tensors.write(path, order.deltas, order.erasure.prefix, order.dtype or torch.float32)
        load = f"pipe.load_lora_weights({json.dumps(str(order.out), ensure_ascii=False)})"
        return Exported(order.out, order.costs(written.rounding), load)
