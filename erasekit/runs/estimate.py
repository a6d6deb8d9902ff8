"""What every method's defaults are predicted to take on the real models, on each size of GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erasekit.backbones.memory import VRAM_GB, budget_gb
from erasekit.registration.plugins import Registries
from erasekit.runs.config import build
from erasekit.runs.plan import Plan
from erasekit.runs.preflight import footprint, prediction
from erasekit.runs.resolve import resolve

SIZES = {"sd15": (512,), "sdxl": (1024,), "sd35-medium": (1024,), "sd35-large": (1024,), "flux": (512, 1024)}
SIZES |= {"flux2-klein-base-4b": (1024,), "flux2-klein-base-9b": (1024,)}


def table(registries: Registries) -> list[dict[str, Any]]:
    """The predicted peak of every method's defaults on the real models, on each size of GPU: a row each, the batch fitted."""
    rows = []
    for method in registries.methods.entries():
        for backbone, sizes in SIZES.items():
            for size in sizes:
                for gb in VRAM_GB:
                    flags = {"method": method.name, "backbone": backbone, "concepts": ("a dog",)}
                    held = [f"backbone.vram={gb}", "backbone.dtype=bfloat16", "backbone.device=cpu"]
                    rows.append(_row(resolve(build(flags, overrides=[*held, f"protocol.size={size}"]), registries), gb))
    return rows


def _row(plan: Plan, gb: int) -> dict[str, Any]:
    found, config = prediction(plan), plan.method_config
    held = plan.backbone.needs(plan.backbone_config, plan.protocol.size).held
    trains = footprint(plan).rows > 0
    batch = f"{getattr(config, 'batch', 1)} x {getattr(config, 'accumulate', 1)}" if trains else ""
    fits = found.peak <= budget_gb(gb) and not (trains and held.weights == "offload")
    names: Mapping[str, Any] = {"method": plan.config.method, "backbone": plan.config.backbone, "size": plan.protocol.size}
    how = {"weights": held.weights, "encoders": held.encoders, "checkpointing": held.checkpointing, "batch": batch}
    return {**names, "vram": gb, "predicted_gb": round(found.peak, 1), "fits": fits, **how}
