"""Prompts and seeds to images on disk. Batches are fixed by the prompt list, so a resumed run draws the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from erasekit.atomic import replacing
from erasekit.backbones.protocol import Backbone, Conditioning
from erasekit.errors import ErasekitError, UsageError
from erasekit.evaluation.tasks import Prompt, Protocol, Sampler
from erasekit.events import progress
from erasekit.safety import reject_unsafe

SAMPLERS = get_args(Sampler)
# What Pillow raises for a file that is not a whole image, or one of absurd size.
PIL_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
KEY = "erasekit"  # of what an image was drawn from, in its file


def set_sampler(pipe: Any, sampler: str) -> None:
    """Give a pipeline the scheduler that a protocol names, built from the pipeline's own scheduler config.

    `default` leaves it as it is; `ddim` is deterministic DDIM with trailing spacing (Lin et al. 2024, section 3.3), so that
    the first step is pure noise; `dpm` is DPM-Solver++ (2M).

    Raises:
        UsageError: the sampler is unknown, or the model is of a kind that it cannot sample from.
    """
    if sampler == "default":
        return
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    classes = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}
    if sampler not in classes:
        raise UsageError(f"Unknown sampler '{sampler}'. Choose one of: {', '.join(SAMPLERS)}.")
    scheduler = classes[sampler]
    if scheduler not in pipe.scheduler.compatibles and not isinstance(pipe.scheduler, scheduler):
        raise UsageError(f"Sampler '{sampler}' cannot sample a {type(pipe.scheduler).__name__} model. Use 'default'.")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)


def base_key(backbone: Backbone, protocol: Protocol, prompts: Sequence[Prompt]) -> str:
    """The name of the folder that holds the unedited model's images: 16 hex digits over all that decides their bytes."""
    weights = f"{backbone.source}@{backbone.revision}" if backbone.revision else backbone.fingerprint()
    held = [str(backbone.dtype), backbone.device.type, backbone.embedded_guidance, version("torch"), version("diffusers")]
    parts = [weights, held, protocol.model_dump(), [(p.text, p.seed) for p in prompts]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def image_names(prompts: Sequence[Prompt], protocol: Protocol) -> list[str]:
    """One file name per prompt: its index, and a key over the protocol and the batch it is drawn in."""
    names = []
    for start in range(0, len(prompts), protocol.batch):
        batch = [(p.text, p.seed) for p in prompts[start : start + protocol.batch]]
        for i in range(len(batch)):
            text = json.dumps([protocol.model_dump(), batch, i], sort_keys=True)
            names.append(f"{start + i:05d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.png")
    return names


def sample(
    backbone: Backbone,
    pipe: Any,
    prompts: Sequence[Prompt],
    conditioning: Conditioning,
    empty: Conditioning,
    protocol: Protocol,
    folder: Path,
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Draw one PNG per prompt through the unmodified pipeline; what is already there and intact is kept.

    A batch of which any file is missing or unreadable is drawn again as a whole: an image depends in its last bits on
    the size of the batch that it is drawn in.

    Args:
        backbone: says how its pipeline takes encoded prompts.
        pipe: a diffusers pipeline; its scheduler is set to the protocol's sampler.
        prompts: what to draw; each has its own seed.
        conditioning: the encoded prompts, one row per prompt.
        empty: the encoded empty prompt, one row.
        protocol: how to draw.
        folder: where the images and `index.json` go.
        on_batch: called with (images done, images in all) after every batch.

    Returns:
        The files, in the order of the prompts.

    Raises:
        UsageError: a prompt is one that erasekit refuses.
        ErasekitError: the model draws something that is not a finite number.
    """
    reject_unsafe(p.text for p in prompts)
    if len(conditioning) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many encoded prompts, given {len(conditioning)}.")
    set_sampler(pipe, protocol.sampler)
    pipe.set_progress_bar_config(disable=True)
    paths = [folder / name for name in image_names(prompts, protocol)]
    _write_index(folder, prompts, paths)
    for start in range(0, len(prompts), protocol.batch):
        here = slice(start, start + protocol.batch)
        if not all(intact(p) for p in paths[here]):
            arguments = backbone.call_arguments(conditioning[here], empty=empty, guidance=protocol.guidance)
            images = _draw(pipe, [p.seed for p in prompts[here]], protocol, arguments)
            for path, image in zip(paths[here], images, strict=True):
                with replacing(path) as temporary:
                    image.save(temporary, format="PNG")
        if on_batch:
            on_batch(min(here.stop, len(prompts)), len(prompts))
    return paths


def generate(
    backbone: Backbone, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], protocol: Protocol
) -> list[Image.Image]:
    """Draw prompts with the plain pipeline call, one seed per prompt.

    Raises:
        UsageError: a prompt is one that erasekit refuses.
    """
    reject_unsafe(prompts)
    set_sampler(pipe, protocol.sampler)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), protocol.batch):
        progress("images", start, len(prompts))
        images += _batch(backbone, pipe, prompts, seeds, protocol, start)
    progress("images", len(prompts), len(prompts))
    return images


def generate_to(
    paths: Sequence[Path],
    keys: Sequence[str],
    backbone: Backbone,
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    protocol: Protocol,
) -> None:
    """`generate` into files, each batch written as soon as it is drawn; images that are there with their key are kept.

    Args:
        paths: a PNG for each prompt.
        keys: what each is drawn from, of `keys_of`; it is written into the file.
        backbone: says how its pipeline takes encoded prompts.
        pipe: a diffusers pipeline.
        prompts: what to draw.
        seeds: of each prompt.
        protocol: how to draw.
    """
    reject_unsafe(prompts)
    set_sampler(pipe, protocol.sampler)
    for start in range(0, len(prompts), protocol.batch):
        progress("images", start, len(prompts))
        here = slice(start, start + protocol.batch)
        if any(key_in(path) != key or not intact(path) for path, key in zip(paths[here], keys[here], strict=True)):
            images = _batch(backbone, pipe, prompts, seeds, protocol, start)
            for path, key, image in zip(paths[here], keys[here], images, strict=True):
                note = PngInfo()
                note.add_text(KEY, key)
                with replacing(path) as temporary:
                    image.save(temporary, format="PNG", pnginfo=note)
    progress("images", len(prompts), len(prompts))


def keys_of(prompts: Sequence[str], seeds: Sequence[int], protocol: Protocol, *drawn_by: Any) -> list[str]:
    """A key for each image over all that decides its bytes: what draws it, the protocol, its batch and its place there."""
    held = [version("torch"), version("diffusers"), protocol.model_dump(), *drawn_by]
    keys = []
    for i in range(len(prompts)):
        start = i - i % protocol.batch
        batch = [list(prompts[start : start + protocol.batch]), list(seeds[start : start + protocol.batch]), i - start]
        keys.append(hashlib.sha256(json.dumps([held, batch], sort_keys=True, default=str).encode()).hexdigest()[:16])
    return keys


def key_in(path: Path) -> str:
    """The key of an image that `generate_to` drew; "" of any other file, and of none."""
    try:
        with Image.open(path) as image:
            return str(image.info.get(KEY, ""))
    except PIL_ERRORS:
        return ""


def _batch(
    backbone: Backbone, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], protocol: Protocol, start: int
) -> list[Image.Image]:
    here, empty = slice(start, start + protocol.batch), backbone.encode([""])
    arguments = backbone.call_arguments(backbone.encode(prompts[here]), empty=empty, guidance=protocol.guidance)
    return _draw(pipe, seeds[here], protocol, arguments)


def _draw(pipe: Any, seeds: Iterable[int], protocol: Protocol, arguments: dict[str, Any]) -> list[Image.Image]:
    drawn = pipe(
        **arguments,
        num_inference_steps=protocol.steps,
        height=protocol.size,
        width=protocol.size,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        output_type="np",
    ).images
    if not np.isfinite(drawn).all():
        raise ErasekitError("The model draws images that are not finite numbers. Erase again in float32 or with a lower rate.")
    images: list[Image.Image] = pipe.image_processor.numpy_to_pil(drawn)
    return images


def intact(path: Path) -> bool:
    """Whether an image is there, whole, and its checksums right."""
    try:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            image.load()
    except PIL_ERRORS:
        return False
    return True


def load_images(paths: Sequence[Path]) -> tuple[torch.Tensor, list[int]]:
    """Read images.

    An image that is black all over is none: a safety checker puts it in the place of what it holds back, an overflow in the
    place of what could not be computed. To judge it would flatter an erasure.

    Returns:
        (n, 3, h, w) uint8 of those that can be read and are not black, in order, and the indices of the others.
    """
    images, unreadable = [], []
    for i, path in enumerate(paths):
        pixels = _pixels(path) if intact(path) else None
        if pixels is not None and pixels.any():
            images.append(pixels)
        else:
            unreadable.append(i)
    return torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8), unreadable


def _pixels(path: Path) -> torch.Tensor:
    """(3, h, w) uint8."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _write_index(folder: Path, prompts: Sequence[Prompt], paths: Sequence[Path]) -> None:
    rows = [{"file": path.name, **prompt._asdict()} for path, prompt in zip(paths, prompts, strict=True)]
    with replacing(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
