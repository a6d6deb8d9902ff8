"""What a plan takes besides memory: images, passes, hours on this device, and disk; a guess is called an estimate."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from erasekit.backbones.held import find_device
from erasekit.backbones.timing import tflops
from erasekit.runs.forecast import earlier
from erasekit.runs.offers import offered
from erasekit.runs.plan import Plan
from erasekit.runs.preflight import erase_rows, image_rows, to_download
from erasekit.runs.ready import evaluation_prompts
from erasekit.runs.room import Runs, base_images, disk_gb

ESTIMATE = "an estimate, from the model's shapes and a timing of this device"


class Cost(NamedTuple):
    """What a plan takes, all its runs together.

    Attributes:
        base_images: of the unedited model, each drawn once; fewer if other runs have drawn some.
        erased_images: of erased models.
        passes: forward passes of the denoiser, a row each; a row of training counts as three.
        image_s: seconds that an image takes; None if nothing is known.
        erase_s: seconds that the erasing of a run takes, if it is computed.
        taken: how many runs take their erasure from an earlier one, so that it is not computed.
        hours: of drawing and erasing; judging comes on top.
        basis: where the seconds come from.
        disk_gb: that has still to be written, at most.
        download_gb: of weights of the base that are not on this machine.
    """

    base_images: int
    erased_images: int
    passes: float
    image_s: float | None
    erase_s: float | None
    taken: int
    hours: float | None
    basis: str
    disk_gb: float
    download_gb: float


def runs_of(plan: Plan) -> Runs:
    """The runs of a plan, each with what it draws."""
    return [(each, evaluation_prompts(each)) for each in (plan.singles() if plan.separate else [plan])]


def cost(plan: Plan, out: Path, *, anew: bool = False) -> Cost:
    """What a plan takes; its time as earlier runs under `out` took, or else estimated for a model of natural images.

    Args:
        plan: what is done.
        out: where earlier runs are.
        anew: take no erasure from them.
    """
    runs = runs_of(plan)
    taken = 0 if anew or plan.erasure_sha256 else sum(bool(offered(out, each)) for each, _ in runs)
    images = base_images(runs), sum(len(prompts) for _, prompts in runs)
    per_image = image_rows(plan)
    erasing = 0.0 if plan.erasure_sha256 else erase_rows(runs[0][0])
    known = earlier(out, plan)
    basis = f"as {len(known.image)} earlier runs here" if known.image else ESTIMATE
    image_s = median(known.image) if known.image else _estimated(plan, runs, per_image)
    erase_s = median(known.erase) if known.erase else None if image_s is None else image_s / per_image * erasing
    seconds = None if image_s is None or erase_s is None else image_s * sum(images) + erase_s * (len(runs) - taken)
    return Cost(
        base_images=images[0],
        erased_images=images[1],
        passes=per_image * sum(images) + erasing * (len(runs) - taken),
        image_s=image_s,
        erase_s=erase_s,
        taken=taken,
        hours=None if seconds is None else seconds / 3600,
        basis="" if seconds is None else basis,
        disk_gb=disk_gb(runs, out),
        download_gb=to_download(plan)[0],
    )


def _estimated(plan: Plan, runs: Runs, per_image: int) -> float | None:
    """Seconds of an image, from what a pass of the model is and how fast this device works; None where that says nothing."""
    needs, family = plan.backbone.needs(plan.backbone_config, plan.protocol.size), plan.backbone.capabilities.family
    if plan.backbone.domain != "natural" or needs.held.weights == "offload" or not needs.tflop:
        return None  # a mini is smaller than its class says; layers that are brought one by one take the time of the bus
    device = find_device(plan.backbone_config.device)
    sides = [round(math.sqrt((p.width or plan.protocol.size) * (p.height or plan.protocol.size))) for _, ps in runs for p in ps]
    tflop = {side: plan.backbone.needs(plan.backbone_config, side).tflop for side in set(sides)}
    mean = sum(tflop[side] for side in sides) / len(sides)
    held_in: Any = getattr(plan.backbone, "dtype_of", lambda config, device: torch.float32)
    return per_image * mean / tflops(device, held_in(plan.backbone_config, device), family)
