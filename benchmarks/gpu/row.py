"""One row of the GPU benchmark, in a process of its own: load, encode, erase, sample, each with its time and peak memory.

`bench.py` calls it. What is known is written after every stage, so that a process that is killed leaves what it measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from erasekit.backbones import memory
from erasekit.erasures.loading import load_into
from erasekit.evaluation.sampling import generate
from erasekit.methods import validation
from erasekit.registration.plugins import default
from erasekit.runs.compute import compute
from erasekit.runs.config import build
from erasekit.runs.plan import Plan
from erasekit.runs.preflight import POOLS
from erasekit.runs.ready import evaluation_prompts
from erasekit.runs.resolve import resolve

STEPS = {"protocol": 4, "method": 5}  # what a row is cut to: sampling steps of trajectories and images, training steps
FEW = {"protocol": 2, "method": 3}  # a row for a CPU
# What else is cut there: trajectories, images, and steps of what a method does beside its training.
LITTLE = {**dict.fromkeys(POOLS, 2), "attack_steps": 2, "plain_steps": 1, "saliency_draws": 1, "loops": 1}
USABLE = 0.96  # share of a GPU's memory that its driver and the context of CUDA leave
# Encoders with random weights find no words near a concept; on FLUX.1 TRACE erases 16 of them with it, and their counts.
NEAR = ":" + ",".join(f"a cat{i},two cat{i}s" for i in range(16))


class Row(NamedTuple):
    """What is measured.

    Attributes:
        family: the backbone.
        method: the method, at its own defaults.
        size: of the images, in pixels.
        vram: the size of GPU, in GB, that is planned for and that memory is limited to.
        whole: nothing is cut; other rows take few steps.
        sampled: images are drawn with the erasure at the end.
        few: cut to what a CPU does in minutes.
    """

    family: str
    method: str
    size: int
    vram: str
    whole: bool = False
    sampled: bool = False
    few: bool = False

    @property
    def name(self) -> str:
        """What it is called on the command line and in the results."""
        cut = "-whole" if self.whole else "-few" if self.few else ""
        return f"{self.family}-{self.method}-{self.size}-{self.vram}{cut}"


class Meter:
    """Writes seconds and peak memory of stages to a file as they end."""

    def __init__(self, path: Path, row: Row) -> None:
        """Results go to `path`."""
        self.path, self.result = path, {"row": row._asdict(), "stages": {}}

    def note(self, **values: Any) -> None:
        """Add to the result and write it."""
        self.result |= values
        self.path.write_text(json.dumps(self.result))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block, one that fails too."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        memory.reset_peak()
        began, cpu_began = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            with_gpu = torch.cuda.is_available()
            if with_gpu:
                torch.cuda.synchronize()
            held = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if with_gpu else (0, 0)
            found = {"s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}
            found |= dict(zip(("allocated_gb", "reserved_gb"), (n / 2**30 for n in held), strict=True))
            found["resident_gb"] = memory.resident_mb() / 2**10
            self.result["stages"][name] = {key: round(value, 3) for key, value in found.items()}
            self.note()


class Passes:
    """Counts rows that the denoiser predicts without gradients, in the place of a backbone's `predict`."""

    def __init__(self, predict: Any) -> None:
        """Wrap it."""
        self.predict, self.rows, self.seconds, self.largest = predict, 0, 0.0, 0

    def __call__(self, x: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        """The prediction, timed if no gradient is asked for."""
        self.largest = max(self.largest, len(x))
        timed = not torch.is_grad_enabled()
        began = self._now() if timed else 0.0
        prediction: torch.Tensor = self.predict(x, *arguments, **settings)
        if timed:
            self.seconds += self._now() - began
            self.rows += len(x)
        return prediction

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class Encodings:
    """Counts prompts that are encoded, in the place of a backbone's `_encode`."""

    def __init__(self, encode: Any) -> None:
        """Wrap it."""
        self.encode, self.n, self.seconds = encode, 0, 0.0

    def __call__(self, prompt: str) -> Any:
        """The encoded prompt, timed."""
        began = time.perf_counter()
        encoded = self.encode(prompt)
        self.n, self.seconds = self.n + 1, self.seconds + time.perf_counter() - began
        return encoded


def planned(row: Row, base: Path, device: str, *, steps: int | None = None, size: int | None = None) -> Plan:
    """The plan that a user would have, cut to few steps unless the row is whole.

    Args:
        row: what is measured.
        base: the folder of the model.
        device: where it is held.
        steps: sampling steps; those of the row, if left out.
        size: of the images; the row's, if left out.
    """
    concept = "a cat" + (NEAR if (row.method, row.family) == ("trace", "flux") else "")
    flags = {"method": row.method, "backbone": row.family, "task": "free", "concepts": (concept,), "limit": 2}
    overrides = [f"backbone.path={base}", f"backbone.device={device}", f"backbone.vram={row.vram}"]
    overrides += [f"protocol.size={size or row.size}"]
    registries = default()
    if row.whole:
        return resolve(build(flags, overrides=overrides), registries)
    usual = resolve(build(flags, overrides=overrides), registries)
    counts = FEW if row.few else STEPS
    cut = [f"protocol.steps={steps or counts['protocol']}"]
    own = usual.method_config.model_dump()
    cut += [f"method.{name}={counts['method']}" for name in ("steps", "word_steps") if name in own]
    if row.few:
        cut += [f"method.{name}={min(own[name], most)}" for name, most in LITTLE.items() if name in own]
    return resolve(build(flags, overrides=[*overrides, *cut]), registries)


def fitted(plan: Plan) -> tuple[Plan, dict[str, float] | None]:
    """The plan with the batch that a run would take on its size of GPU, and the peaks in GB predicted for it, if any are."""
    try:
        from erasekit.runs import preflight
    except ImportError:
        return plan, None
    plan = preflight.fitted(plan)
    return plan, {stage: round(gb, 2) for stage, gb in preflight.prediction(plan)._asdict().items()}


def erase(plan: Plan, backbone: Any, meter: Meter, folder: Path) -> None:
    """Compute and save the erasure; notes the time of a training step and of a predicted row."""
    passes, encodings, marks = Passes(backbone.predict), Encodings(backbone._encode), []
    backbone.predict, backbone._encode = passes, encodings
    try:
        with meter.stage("erase"):
            erasure = compute(
                plan, backbone, default(), log=lambda step, total, values: marks.append((step, time.perf_counter()))
            )
    finally:
        del backbone.predict, backbone._encode
        meter.note(texts={"n": encodings.n, "s": round(encodings.seconds, 3)})
        meter.note(rows={"n": passes.rows, "s": round(passes.seconds, 3), "largest": passes.largest})
        spans = [then - now for (step, now), (after, then) in pairwise(marks) if after == step + 1]  # some train several times
        if spans:
            meter.note(step_s=round(sum(spans) / len(spans), 4))
    with meter.stage("save"):
        erasure.save(folder)
    meter.note(file_mb=round((folder / "all.safetensors").stat().st_size / 1e6, 2))


def draw(plan: Plan, backbone: Any, meter: Meter, folder: Path) -> None:
    """Draw one batch at the full number of steps in a fresh pipeline that has loaded the erasure."""
    steps = (dict(plan.task.protocol.model_dump()) | dict(backbone.sampling))["steps"]
    protocol = plan.protocol.model_copy(update={"steps": steps})
    prompts = [p.text for p in evaluation_prompts(plan)][: protocol.batch]
    for part in ("text_encoders", "vae", "denoiser"):
        backbone.release(part)
    with meter.stage("load_pipeline"):
        pipe = backbone.pipeline(encoders=False)
        load_into(pipe, folder, base=backbone, component=default().components.get)
    with meter.stage("sample"):
        generate(backbone, pipe, prompts, list(range(len(prompts))), protocol)
    meter.note(images={"n": len(prompts), "steps": steps})


def measure(row: Row, base: Path, device: str, meter: Meter) -> None:
    """All stages of a row; the first error ends it, and what was measured until then stays."""
    plan, predicted = fitted(planned(row, base, device))
    meter.note(settings=plan.method_config.model_dump(mode="json"), protocol=plan.protocol.model_dump(mode="json"))
    meter.note(predicted_gb=predicted)
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
        limit = USABLE * int(row.vram) * 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        meter.note(limit_gb=round(min(total, limit) / 2**30, 2))
    if row.few:  # what is left is measured on one prompt of each kind, not on 24
        validation.PROMPTS = 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "erasure"
        with meter.stage("load"):
            backbone = plan.backbone.load(plan.backbone_config)
        with meter.stage("encode"):
            prompts = [p.text for p in evaluation_prompts(plan)]
            backbone.encode([*prompts, ""])
        meter.note(encoded=len(prompts) + 1)
        erase(plan, backbone, meter, folder)
        if row.sampled:
            draw(plan, backbone, meter, folder)


def main() -> None:
    """Measure the row that is given as JSON."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("row")
    arguments.add_argument("--base", type=Path, required=True)
    arguments.add_argument("--device", required=True)
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    row = Row(**json.loads(given.row))
    meter = Meter(given.out, row)
    try:
        measure(row, given.base, given.device, meter)
    except Exception as error:
        meter.note(failed=f"{type(error).__name__}: {error}".strip().splitlines()[0])


if __name__ == "__main__":
    main()
