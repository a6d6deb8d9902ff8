"""What a plan is predicted to take, a batch that fits the GPU, and what stands in a plan's way before anything is loaded."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasekit.backbones.memory import USABLE, VRAM_GB, Footprint, Prediction, budget_gb, predict, there_gb
from erasekit.errors import EnvironmentProblem, unknown

if TYPE_CHECKING:
    from erasekit.runs.plan import Plan

CORE_TFLOPS = 0.04  # about what one core of a CPU does in a second
PATIENCE_H = 24.0
BACKWARD = 3.0  # passes that a row of training costs: one forward, and about two for the gradient
# Settings: what methods draw before they train.
POOLS = ("trajectories", "clean_trajectories", "kept_trajectories", "images", "kept_images")
PREDICTIONS = 3.0  # at each step of such a trajectory
VALIDATION = 2000.0  # rows that say what an erasure leaves (`methods.validation`)
UNVALIDATED_GB = 1.0  # closed forms of a model with more weights are not validated on a CPU: it would take hours


def prediction(plan: Plan) -> Prediction:
    """The predicted peaks of a plan's stages in GiB."""
    return _prediction(plan, footprint(plan))


def _prediction(plan: Plan, step: Footprint) -> Prediction:
    """The same for one of the plan's trainings."""
    backbone, protocol = plan.backbone, plan.protocol
    needs = backbone.needs(plan.backbone_config, protocol.size)
    passes = 2 if backbone.capabilities.guidance == "cfg" else 1
    return predict(needs, step, images=protocol.batch, passes=passes)


def planned_gb(plan: Plan) -> int | None:
    """The size of GPU that a plan is for, None if it is for a CPU."""
    if plan.backbone_config.vram != "auto":
        return int(plan.backbone_config.vram)
    device = _device(plan)
    if device.type == "cpu":
        return None
    from erasekit.backbones.memory import vram_gb

    return vram_gb("auto", device)


def fitted(plan: Plan) -> Plan:
    """The plan with batches that are predicted to fit the GPU, whoever set them: the same gradient comes in smaller parts.

    What does not train, is for a CPU, or fits as it is stays as it is; what fits at no batch gets 1.
    """
    gb = planned_gb(plan)
    if gb is None:
        return plan
    components = {key: type(c)(_cut(plan, gb, type(c), c.config)) for key, c in plan.components.items()}
    return replace(plan, method_config=_cut(plan, gb, plan.method, plan.method_config), components=components)


def _cut(plan: Plan, gb: int, kind: type[Any], config: Any) -> Any:
    """Settings of the method or of a component with a smaller batch, and more of them for a step."""
    batch, cut = getattr(config, "batch", 1), config
    if "accumulate" not in type(config).model_fields or not kind(config).footprint(plan).rows:
        return config
    for size in (n for n in range(batch, 0, -1) if batch % n == 0):
        cut = config.model_copy(update={"batch": size, "accumulate": config.accumulate * batch // size})
        if _prediction(plan, kind(cut).footprint(plan)).train <= budget_gb(gb):
            break
    return cut


def preflight(plan: Plan, *, images: int = 0) -> None:
    """See that a plan can work on this machine; nothing is loaded or downloaded for it.

    Args:
        plan: what is done.
        images: how many are drawn, of both sides together.

    Raises:
        EnvironmentProblem: an extra is missing, the GPU, the memory or a disk is too small, or a CPU would take days.
    """
    gb, device = planned_gb(plan), _device(plan)
    held = plan.backbone.needs(plan.backbone_config, plan.protocol.size).held
    if gb is not None:
        from erasekit.backbones.held import check_nf4

        check_nf4(held, gb)
    if path := plan.backbone_config.path:
        _check_base(path)
    if plan.backbone.domain == "mini":
        return
    if held.weights == "offload" and footprint(plan).rows:
        solved = not footprint(replace(plan, components={})).rows
        stages = " and ".join(f"'{name}'" for _, name in plan.components)
        otherwise = f"leave {stages} out" if solved else "take a method that solves in closed form, e.g. uce"
        raise EnvironmentProblem(
            f"'{plan.config.backbone}' cannot be trained with --vram {gb}: its layers are in RAM. "
            f"Use a larger GPU, or {otherwise}."
        )
    _check_memory(plan, gb, device, images)
    _check_patience(plan, device, images)
    _check_download(plan)


def check_tracker(name: str) -> None:
    """See that a tracker is one of accelerate's, and that its package is installed.

    Raises:
        UsageError: there is no such tracker.
        EnvironmentProblem: its package is missing.
    """
    if not name:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    if name not in LOGGER_TYPE_TO_CLASS:
        raise unknown("tracker", name, LOGGER_TYPE_TO_CLASS, "docs/how-to.md")
    if name in map(str, LoggerType) and name not in map(str, get_available_trackers()):
        raise EnvironmentProblem(f"The tracker '{name}' is not installed. Run 'pip install {name}', or leave --tracker out.")


def _check_base(path: str) -> None:
    """See that a local base is there: a folder or a file of weights; ids of the hub are for the download to find."""
    from erasekit.backbones.folders import local_folder

    if not Path(path).expanduser().is_file():
        local_folder(path)


def _check_memory(plan: Plan, gb: int | None, device: Any, images: int) -> None:
    """Compare the prediction with the preset, and with what the device has."""
    found = prediction(plan)
    peak = found.peak if images or erase_rows(plan) else found.encode  # a closed form reads the layers that it edits, no more
    what = f"'{plan.config.method}' on '{plan.config.backbone}' at {plan.protocol.size} px is predicted to take {peak:.0f} GB"
    if gb is not None and peak > budget_gb(gb):
        larger = [size for size in VRAM_GB if size > gb and _fits(plan, size)]
        way_out = f"Use --vram {larger[0]} on such a GPU" if larger else "Use a smaller protocol.size or another method"
        raise EnvironmentProblem(f"{what}, more than --vram {gb} allows. {way_out}.")
    there = there_gb(device)
    if peak > USABLE * there and device.type in ("cpu", "cuda") and (device.type == "cuda" or gb is None):
        where = "the GPU has" if device.type == "cuda" else "is free in this machine's memory"
        raise EnvironmentProblem(f"{what}; {there:.0f} GB {where}. Use a smaller protocol.size, --vram, or a mini backbone.")


def _fits(plan: Plan, gb: int) -> bool:
    changed = replace(plan, backbone_config=plan.backbone_config.model_copy(update={"vram": str(gb)}))
    return prediction(fitted(changed)).peak <= budget_gb(gb)


def cpu_hours(plan: Plan, images: int) -> tuple[float, float]:
    """About how long erasing and drawing take on this machine's CPU; a guess from its number of cores."""
    row = plan.backbone.needs(plan.backbone_config, plan.protocol.size).tflop
    rows = (erase_rows(plan), images * image_rows(plan))
    erasing, drawing = (n * row / (CORE_TFLOPS * (os.cpu_count() or 1)) / 3600 for n in rows)
    return erasing, drawing


def erase_rows(plan: Plan) -> float:
    """About how many rows of the denoiser a plan's method predicts, in its training, before it, and when it is validated."""
    config, concepts = plan.method_config, len(plan.concepts)
    steps = getattr(config, "steps", 0)
    own = plan.method(config).footprint(plan).rows * int(getattr(config, "accumulate", 1))
    trained = BACKWARD * own * steps * concepts
    drawn = sum(getattr(config, name, 0) for name in POOLS) * concepts
    large = plan.backbone.weights_gb(plan.backbone_config) > UNVALIDATED_GB
    validated = 0.0 if not steps and large and _device(plan).type == "cpu" else VALIDATION
    hardened = concepts * sum(component.rows(plan) for component in plan.components.values())
    return trained + hardened + PREDICTIONS * plan.protocol.steps * drawn + validated


def image_rows(plan: Plan) -> int:
    """How many rows drawing an image takes."""
    return plan.protocol.steps * (2 if plan.backbone.capabilities.guidance == "cfg" else 1)


def _check_patience(plan: Plan, device: Any, images: int) -> None:
    if device.type != "cpu" or plan.backbone_config.device == "cpu":
        return
    erasing, drawing = cpu_hours(plan, images)
    if erasing + drawing > PATIENCE_H:
        parts = f"{_long(erasing)} to erase" + (f", {_long(drawing)} to draw {images} images" if images else "")
        fewer = "a GPU, fewer images (--limit) or fewer steps" if images else "a GPU or fewer method.steps"
        raise EnvironmentProblem(
            f"There is no GPU, and on this CPU '{plan.config.method}' on '{plan.config.backbone}' would take about {parts}. "
            f"Use {fewer}, or insist with -s backbone.device=cpu."
        )


def _long(hours: float) -> str:
    return f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.0f} hours"


def to_download(plan: Plan) -> tuple[float, Path]:
    """GB of the base's weights that have yet to be downloaded, and the folder that they come to."""
    from huggingface_hub import constants, try_to_load_from_cache

    repo, cache = plan.backbone_config.path or getattr(plan.backbone, "path", ""), Path(constants.HF_HUB_CACHE)
    if repo.count("/") != 1 or Path(repo).expanduser().exists():
        return 0.0, cache
    if isinstance(try_to_load_from_cache(repo, "model_index.json", revision=plan.backbone_config.revision), str):
        return 0.0, cache
    return float(sum(getattr(plan.backbone, "sizes_gb", ()))), cache


def _check_download(plan: Plan) -> None:
    """See that what has yet to be downloaded has room."""
    need, cache = to_download(plan)
    there = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(there).free / 2**30
    if free < need:
        repo = plan.backbone_config.path or getattr(plan.backbone, "path", "")
        raise EnvironmentProblem(
            f"'{repo}' is about {need:.0f} GB; the cache for downloads has {free:.0f} GB free. Free some, or set HF_HOME."
        )


def footprint(plan: Plan) -> Footprint:
    """What a training step of the plan's method, or of one of its components, holds at once: the most of each."""
    parts: list[Any] = [plan.method(plan.method_config), *plan.components.values()]
    steps = [step for part in parts if (step := part.footprint(plan)).rows]
    return Footprint(*(max(of) for of in zip(*steps, strict=True))) if steps else Footprint()


def _device(plan: Plan) -> Any:
    from erasekit.backbones.held import find_device

    return find_device(plan.backbone_config.device)
