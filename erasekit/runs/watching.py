"""Images drawn while a method trains, beside the base's, so that one can watch the concept go."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from erasekit.atomic import replacing
from erasekit.backbones.protocol import Predict
from erasekit.evaluation.tasks import Prompt
from erasekit.events import Event, Watched, heard
from erasekit.methods.context import RunContext
from erasekit.methods.images import draw
from erasekit.runs.pages.images import blurred, is_blurred
from erasekit.runs.plan import Plan
from erasekit.runs.rundir import RunDirectory

ERASED, KEPT = 3, 2  # prompts of the concepts, and of what has to stay
TIMES = 5  # how often, where nothing else is said
LARGEST = 256  # pixels of an image's side
LARGE_GB = 1.0  # of weights: what a training of such a model draws has to be asked for


def wanted(plan: Plan) -> bool:
    """Whether a plan's training is watched: as it says, or else of a small model."""
    if getattr(plan.method_config, "steps", 0) < 1:
        return False
    if plan.config.sample_every is not None:
        return plan.config.sample_every > 0
    return plan.backbone.weights_gb(plan.backbone_config) < LARGE_GB


def watched_prompts(ctx: RunContext) -> list[Prompt]:
    """Validation prompts that are drawn: some of the concepts, some of what has to stay."""
    return [*ctx.prompts("erase", "validation")[:ERASED], *ctx.prompts("preserve", "validation")[:KEPT]]


def watch(
    plan: Plan, directory: RunDirectory, emit: Callable[[Event], None], asked: Sequence[Prompt], ctx: RunContext
) -> Watch:
    """What draws images while a run's method trains; the time that takes is not counted as the method's own.

    Args:
        plan: how often.
        directory: of the run.
        emit: is told of the images.
        asked: the prompts that are measured on; images are blurred if those are.
        ctx: the run.
    """
    return Watch(
        ctx,
        directory.path / "samples",
        every=plan.config.sample_every,
        blur=is_blurred(plan.task, [p.text for p in (*asked, *watched_prompts(ctx))]),
        emit=emit,
        spent=partial(directory.leave_out, "erase"),
    )


class Watch:
    """Draws a few prompts now and then: `samples/step-N.webp`, the base's images above, the student's below.

    It draws from no generator that anything else draws from, so that the training is the same with it and without.
    """

    def __init__(
        self,
        ctx: RunContext,
        folder: Path,
        *,
        every: int | None,
        blur: bool,
        emit: Callable[[Event], None],
        spent: Callable[[float], None],
    ) -> None:
        """Draw the base's images, which the denoiser still has to be.

        Args:
            ctx: the run.
            folder: where images go.
            every: steps between them; None is a fifth of the training.
            blur: blur them.
            emit: is told of each.
            spent: is told the seconds that each took.
        """
        prompts = watched_prompts(ctx)
        self._ctx, self._folder, self._every, self._blur = ctx, folder, every, blur
        self._emit, self._spent = emit, spent
        self._texts, self._seeds = tuple(p.text for p in prompts), [p.seed for p in prompts]
        self._totals: dict[str, int] = {}  # steps of each training; those of several count on
        self._base = self._draw(None)

    def __call__(self, name: str, step: int, total: int, predict: Predict) -> None:
        """See whether images are due after step `step` of `total` of the training called `name`, and draw them."""
        self._totals[name] = total
        before = sum(steps for other, steps in self._totals.items() if other != name)
        every = self._every or -(-total // TIMES)
        if (step > 0 and step not in (total, step // every * every)) or (step == 0 and before):
            return
        path = self._folder / f"step-{before + step}.webp"
        _save([self._base, self._draw(predict)], path)
        self._emit(Watched(before + step, path.name, self._texts, self._blur))

    @torch.no_grad()
    def _draw(self, predict: Predict | None) -> list[Image.Image]:
        start = time.monotonic()
        ctx = self._ctx
        with heard(lambda event: None):  # the training's own progress is what is shown
            x0 = draw(ctx, ctx.backbone.encode(list(self._texts)), self._seeds, predict=predict)
        pixels = ctx.backbone.decode(x0).float().clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()
        images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
        self._spent(time.monotonic() - start)
        return [blurred(image) for image in images] if self._blur else images


def _save(rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """Write rows of images as one."""
    side, gap = min(LARGEST, rows[0][0].width), 2
    sheet = Image.new("RGB", (len(rows[0]) * (side + gap) - gap, len(rows) * (side + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x * (side + gap), y * (side + gap)))
    with replacing(path) as temporary:
        sheet.save(temporary, format="WEBP", quality=90)
