"""Prompts and seeds to images on disk, each named by all that decides its bytes: drawn once, whoever asks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from erasekit.atomic import lock_of, replacing, sweep
from erasekit.backbones.protocol import Backbone, Conditioning
from erasekit.errors import ErasekitError, UsageError
from erasekit.evaluation.tasks import Prompt, Protocol, Sampler
from erasekit.events import progress
from erasekit.registration.source import source_digest
from erasekit.safety import reject_unsafe

LEAST = 8  # rows of a call on one thread: fewer take other ways through its matrix products, which round otherwise
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


def model_key(backbone: Backbone, *more: str) -> str:
    """Sixteen hex digits over all of a model that decides the bytes of its images; `more` says what was done to it."""
    weights = f"{backbone.source}@{backbone.revision}" if backbone.revision else backbone.fingerprint()
    held = [str(backbone.dtype), backbone.device.type, backbone.embedded_guidance, version("torch"), version("diffusers")]
    source = source_digest(type(backbone).__module__)
    return _digest([weights, held, *([source] if source else []), *more])


def base_key(backbone: Backbone, protocol: Protocol, prompts: Sequence[Prompt]) -> str:
    """Sixteen hex digits over what the unedited model draws from a list of prompts."""
    return _digest([model_key(backbone), protocol.model_dump(), [(p.text, p.seed) for p in prompts]])


class Calls(NamedTuple):
    """In what calls of the pipeline images are drawn, so that an image does not depend on what is drawn beside it.

    Bytes are equal in all places of calls of one size, if every thread has the same share of a call, and not too small a one:
    measured on both mini models. On one thread, calls of eight rows and more are all alike.

    Attributes:
        threads: of a CPU: a power of two; 0 elsewhere.
        least: rows; a call that is shorter is filled up.
        most: rows.
    """

    threads: int
    least: int
    most: int

    @classmethod
    def of(cls, backbone: Backbone, protocol: Protocol) -> Calls:
        """For a backbone where it is now."""
        if backbone.device.type != "cpu":
            return cls(0, protocol.batch, protocol.batch)
        threads = 2 ** (torch.get_num_threads().bit_length() - 1)
        unit = 4 * threads if 4 * threads <= protocol.batch else threads
        most = math.ceil(protocol.batch / unit) * unit
        return cls(threads, min(LEAST, most) if threads == 1 else most, most)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Keep to the number of threads."""
        before = torch.get_num_threads()
        try:
            if self.threads:
                torch.set_num_threads(self.threads)
            yield
        finally:
            torch.set_num_threads(before)


def image_key(prompt: Prompt, protocol: Protocol, calls: Calls) -> str:
    """Sixteen hex digits over all of a prompt and how it is drawn that decides the bytes of its image, for a given model.

    A prompt's own guidance scale and size go over the protocol's. The number of rows is part of it where it matters.
    """
    how = [protocol.sampler, protocol.steps, *_drawn_as(prompt, protocol)]
    rows = calls.most if calls.least == calls.most else None
    return _digest([how, prompt.text, prompt.seed, calls.threads, rows])


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _drawn_as(prompt: Prompt, protocol: Protocol) -> tuple[float, int, int]:
    """The guidance scale, width and height of one image."""
    guidance = protocol.guidance if prompt.guidance is None else prompt.guidance
    return float(guidance), prompt.width or protocol.size, prompt.height or protocol.size


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

    An image depends on its prompt, its seed and the protocol, and neither on its place in a call nor on what else the call
    draws (see `Calls`). So files are named by `image_key`, and whoever asks for an image of this model finds it in `folder`.

    Args:
        backbone: says how its pipeline takes encoded prompts.
        pipe: a diffusers pipeline; its scheduler is set to the protocol's sampler.
        prompts: what to draw; each has its own seed, and may have a guidance scale and a size of its own.
        conditioning: the encoded prompts, one row per prompt.
        empty: the encoded empty prompt, one row.
        protocol: how to draw.
        folder: where the images of this model are; several processes may draw into it at once.
        on_batch: called with (images done, images in all) before the first call and after every one.

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
    if folder.is_dir():
        sweep(folder)
    calls = Calls.of(backbone, protocol)
    paths = [folder / f"{image_key(p, protocol, calls)}.png" for p in prompts]
    missing = {path: i for i, path in enumerate(paths) if not intact(path)}
    left = len(missing)
    if on_batch:
        on_batch(len(prompts) - left, len(prompts))
    for call in _alike(list(missing.values()), prompts, protocol, calls.most):
        with _held(folder, [paths[i] for i in call]), calls.steady():  # who comes second finds them drawn
            rows = [i for i in call if not intact(paths[i])]
            filled = [*rows, *rows[-1:] * (calls.least - len(rows))]
            if rows:
                guidance, width, height = _drawn_as(prompts[rows[0]], protocol)
                arguments = backbone.call_arguments(conditioning[filled], empty=empty, guidance=guidance)
                place = len(prompts) - left, len(rows), len(prompts)
                images = _draw(pipe, [prompts[i].seed for i in filled], protocol.steps, width, height, arguments, place)
                for i, image in zip(rows, images, strict=False):
                    with replacing(paths[i]) as temporary:
                        image.save(temporary, format="PNG")
        left -= len(call)
        if on_batch:
            on_batch(len(prompts) - left, len(prompts))
    return paths


@contextmanager
def _held(folder: Path, paths: Sequence[Path]) -> Iterator[None]:
    """Hold the locks of images, each shared by one image in 4,096; in one order everywhere, so that none waits for another."""
    with ExitStack() as locks:
        for part in sorted({path.name[:3] for path in paths}):
            locks.enter_context(lock_of(folder / part))
        yield


def _alike(rows: Sequence[int], prompts: Sequence[Prompt], protocol: Protocol, most: int) -> Iterator[list[int]]:
    """The rows in calls of one guidance scale and size each."""
    alike: dict[tuple[float, int, int], list[int]] = {}
    for i in rows:
        alike.setdefault(_drawn_as(prompts[i], protocol), []).append(i)
    for of in alike.values():
        for start in range(0, len(of), most):
            yield of[start : start + most]


def write_index(folder: Path, prompts: Sequence[Prompt], names: Sequence[str]) -> None:
    """Write index.json: which file was drawn from what."""
    rows = [{"file": name, **prompt._asdict()} for name, prompt in zip(names, prompts, strict=True)]
    with replacing(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


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
    place = start, len(prompts[here]), len(prompts)
    return _draw(pipe, seeds[here], protocol.steps, protocol.size, protocol.size, arguments, place)


def _draw(
    pipe: Any, seeds: Iterable[int], steps: int, width: int, height: int, arguments: dict[str, Any], place: tuple[int, int, int]
) -> list[Image.Image]:
    """Images of one call; `place` says how many were done before it, how many it draws, and how many there are."""
    before, rows, total = place

    def told(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress("images", before + rows * min(index + 1, steps) // (steps + 1), total)
        return {}

    drawn = pipe(
        **arguments,
        num_inference_steps=steps,
        height=height,
        width=width,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        output_type="np",
        callback_on_step_end=told,
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


def load_image(path: Path) -> torch.Tensor | None:
    """Read an image.

    One that is black all over is none: a safety checker puts it in the place of what it holds back, an overflow in the place
    of what could not be computed. To judge it would flatter an erasure.

    Returns:
        (3, h, w) uint8; None if it cannot be read or is black.
    """
    if not intact(path):
        return None
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return pixels if pixels.any() else None
