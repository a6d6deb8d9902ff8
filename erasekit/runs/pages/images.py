"""Images of a page: opened, blurred where they have to be, written into the page within a budget, laid out as a grid."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from erasekit.atomic import replacing
from erasekit.evaluation.sampling import PIL_ERRORS
from erasekit.evaluation.tasks import Task
from erasekit.safety import is_sexual

BUDGET = 4_000_000  # bytes of all images of a page together, as they stand in it; a page shall stay under 5 MB
RUNGS = ((512, 82), (384, 82), (320, 80), (256, 78), (224, 70), (192, 62), (160, 55), (128, 45), (96, 35), (64, 25))
SAMPLED = 24  # images that a rung is chosen by


def is_blurred(task: Task, prompts: Iterable[str]) -> bool:
    """Whether images of a task are blurred unless somebody asks to see them: the task says so, or a prompt is sexual."""
    return task.blurred or is_sexual(prompts)


def opened(path: Path, *, blur: bool) -> Image.Image | None:
    """An image, blurred in its pixels if asked for; None if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except PIL_ERRORS:
        return None
    return blurred(image) if blur else image


def blurred(image: Image.Image) -> Image.Image:
    """So far out of focus that no more than its colours are left: nothing that is hidden is in the file."""
    return image.filter(ImageFilter.GaussianBlur(image.width / 8))


def embedded(paths: Sequence[Path], *, blur: Sequence[bool], budget: int = BUDGET) -> list[str]:
    """Images as data URIs (WebP), all at the same largest size and quality at which they keep to a budget.

    Args:
        paths: the images.
        blur: which of them are blurred.
        budget: bytes that all data URIs may take together; kept unless even the smallest size needs more.

    Returns:
        A URI for each path, "" for one that cannot be read.
    """
    every = list(zip(paths, blur, strict=True))
    some = every[:: max(1, len(every) // SAMPLED)][:SAMPLED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rung in RUNGS:
            size = sum(map(len, pool.map(partial(_uri, rung), some)))
            if size * len(every) > budget * len(some) and rung != RUNGS[-1]:
                continue
            found = list(pool.map(partial(_uri, rung), every))
            if sum(map(len, found)) <= budget:
                break
    return found


def _uri(rung: tuple[int, int], file: tuple[Path, bool]) -> str:
    path, blur = file
    image = opened(path, blur=blur)
    if image is None:
        return ""
    side, quality = rung
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def grid(
    base_paths: Sequence[Path],
    erased_paths: Sequence[Path],
    path: Path,
    *,
    captions: Sequence[str] = (),
    columns: int = 4,
    blur: bool = False,
) -> Path:
    """Write a PNG of pairs, the unedited model's image left and the erased one's right of each, with captions below.

    An image that cannot be read is an empty field.
    """
    side, gap, line = 128, 4, 18
    width, height = 2 * side + 3 * gap, side + line + 2 * gap
    n = len(base_paths)
    sheet = Image.new("RGB", (width * min(n, columns), height * -(-n // columns)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, both in enumerate(zip(base_paths, erased_paths, strict=True)):
        x, y = width * (i % columns) + gap, height * (i // columns) + gap
        for k, file in enumerate(both):
            image = opened(file, blur=blur)
            if image:
                sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x + k * (side + gap), y))
        caption = captions[i] if captions else ""
        while draw.textlength(caption, font) > width - 2 * gap:
            caption = caption[:-2] + "…"
        draw.text((x, y + side + 2), caption, "black", font)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path
