"""How much of the disk a plan takes, and whether it has that: seen before anything is begun."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from erasekit.errors import EnvironmentProblem
from erasekit.evaluation.tasks import Prompt
from erasekit.runs.plan import Plan
from erasekit.runs.preflight import footprint, to_download
from erasekit.runs.rundir import path_of, read_status

SPARE_GB = 0.1  # of a run: a small erasure, the report, the log
BYTES = 3  # of a pixel of a PNG, at most
MOMENTS = 3 / 4  # of what is trained and its gradient and moments, the part that a checkpoint holds

Runs = Sequence[tuple[Plan, Sequence[Prompt]]]  # each with what it draws


def base_images(runs: Runs) -> int:
    """How many images of the unedited model runs need together: an image is drawn once, whoever asks."""
    return len({_image(p) for _, prompts in runs for p in prompts})


def disk_gb(runs: Runs, out: Path) -> float:
    """GB that runs still have to write under `out`, at most: images, erasures, and a checkpoint of training."""
    base: dict[tuple[object, ...], float] = {}
    total, training = 0.0, 0.0
    for plan, prompts in runs:
        done = read_status(path_of(out, plan)).get("finished", ())
        sizes = {_image(p): _gb(p, plan) for p in prompts}
        base |= dict.fromkeys(sizes, 0.0) if "base_images" in done else {k: base.get(k, gb) for k, gb in sizes.items()}
        total += 0.0 if "sample" in done else sum(_gb(p, plan) for p in prompts)
        if "erase" not in done:
            step = footprint(plan)
            trained = step.trained_gb if step.rows and not plan.erasure_sha256 else 0.0
            total, training = total + SPARE_GB + (1 - MOMENTS) * trained, max(training, MOMENTS * trained)
    return total + training + sum(base.values())


def check_room(runs: Runs, out: Path) -> None:
    """See that what runs write has room under `out`, together with weights that are downloaded to the same disk.

    Raises:
        EnvironmentProblem: it has not.
    """
    need, folder = disk_gb(runs, out), _existing(out)
    download, cache = to_download(runs[0][0])
    more = download if folder.stat().st_dev == _existing(cache).stat().st_dev else 0.0
    free = shutil.disk_usage(folder).free / 1e9
    if free < need + more:
        images = sum(len(prompts) for _, prompts in runs)
        what = f"{images} images of each side" + (f", and {more:.0f} GB of weights on the same disk" if more else "")
        line = f"The run needs up to {_told(need + more)} in '{out}' ({what}), which has {_told(free)} free"
        raise EnvironmentProblem(f"{line}. Free some, draw fewer with --limit, or choose another folder with --out.")


def _image(prompt: Prompt) -> tuple[object, ...]:
    return prompt.text, prompt.seed, prompt.guidance, prompt.width, prompt.height


def _gb(prompt: Prompt, plan: Plan) -> float:
    """GB of an image."""
    size = plan.protocol.size
    return BYTES * (prompt.width or size) * (prompt.height or size) / 1e9


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())


def _told(gb: float) -> str:
    return f"{gb:.0f} GB" if gb >= 10 else f"{gb:.1f} GB" if gb >= 1 else f"{1000 * gb:.0f} MB"
