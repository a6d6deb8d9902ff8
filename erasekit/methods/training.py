"""The one training loop: accumulate, clip, log, checkpoint, resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file

from erasekit.atomic import replacing
from erasekit.backbones.protocol import Predict
from erasekit.erasures.deltas import LowRank
from erasekit.errors import ErasekitError
from erasekit.events import note
from erasekit.methods.adapters import Init
from erasekit.methods.context import RunContext
from erasekit.methods.method import MethodConfig, OrNone
from erasekit.methods.students import lora
from erasekit.processes import here

Losses = Mapping[str, torch.Tensor]


class TrainingConfig(MethodConfig):
    """How a method trains; methods inherit these settings into their own."""

    steps: int = Field(200, ge=0, description="training steps; 0 skips the training")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="of the rate after the warm-up: it falls along a cosine to a twentieth, or stays"
    )
    warmup: int = Field(10, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 does not clip")
    accumulate: int = Field(1, ge=1, description="batches whose mean gradient makes one step")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")


class LoraTrainingConfig(TrainingConfig):
    """How the published methods train: at a constant rate, most of them without clipping, and some of them LoRAs."""

    schedule: Literal["cosine", "constant"] = Field(
        "constant", description="of the rate: it falls along a cosine to a twentieth, or stays (published: constant)"
    )
    warmup: int = Field(0, ge=0, description="steps of linear warm-up (published: 0)")
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0 does not clip (published, but for MACE)")
    init: Init = Field("uniform", description="what A begins with: uniform in +-1/sqrt(in), or gaussian of deviation 1/rank")
    alpha: Annotated[float | None, OrNone] = Field(
        None, gt=0, description="alpha of the LoRAs, of which alpha/rank B A counts; none, the rank"
    )


def train(
    losses: Callable[[int, torch.Generator], Losses],
    parameters: Sequence[torch.Tensor],
    config: TrainingConfig,
    *,
    ctx: RunContext,
    name: str,
    predict: Predict | None = None,
) -> None:
    """Minimise the sum of `losses(batch, generator)` over `parameters`, in place.

    Every batch has a generator of its own, named by its number, so that a training that was killed goes on from its
    checkpoint to the same result. Parameters without a gradient in a step keep their value and their moments. Where several
    processes are at work on the run, each takes its share of a step's batches; the gradients of all make the step.

    Args:
        losses: gives the named losses of batch number 0, 1, ...
        parameters: what is trained, in a fixed order.
        config: steps, rate and so on.
        ctx: the run; checkpoints are written if it has a directory.
        name: names the checkpoint and the generators.
        predict: the student's prediction, if it is not the context's, for those who watch what it draws.

    Raises:
        ErasekitError: a loss or a gradient is not finite; the last checkpoint stays.
    """
    together = here()
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    path = None if ctx.directory is None else ctx.directory / "checkpoints" / f"{name}.safetensors"
    done = 0 if path is None else _restore(path, parameters, optimizer)
    together.begin_alike(parameters)
    if together.count > config.accumulate:
        note(f"Only {config.accumulate} of {together.count} processes train. Set method.accumulate={together.count} for all.")
    ctx.watch(name, done, config.steps, predict or ctx.predict)
    for step in range(done, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        values: dict[str, float] = {}
        for batch in together.share(range(step * config.accumulate, (step + 1) * config.accumulate)):
            parts = losses(batch, ctx.generator(f"{name}/{batch}"))
            total = torch.stack(list(parts.values())).sum() / config.accumulate
            if not math.isfinite(total.item()):
                raise ErasekitError(_not_finite(name, step, parts, path))
            total.backward()
            values |= {key: value.item() for key, value in parts.items()}
        together.add_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], config.clip or math.inf)
        if not math.isfinite(norm.item()):  # a finite loss may have such a gradient; no checkpoint may hold what it leads to
            raise ErasekitError(_not_finite(name, step, {"gradient": norm}, path))
        optimizer.step()
        ctx.log(step + 1, config.steps, values)
        if path is not None and together.first and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
            _save(path, step + 1, parameters, optimizer)
        ctx.watch(name, step + 1, config.steps, predict or ctx.predict)


def train_lora(
    losses: Callable[[int, torch.Generator], Losses],
    layers: Sequence[str],
    rank: int,
    config: LoraTrainingConfig,
    *,
    ctx: RunContext,
    name: str,
    generator: torch.Generator,
) -> dict[str, LowRank]:
    """Train one LoRA on some layers of the denoiser as `train` does, and take it off again: what it adds to each layer.

    Args:
        losses: gives the named losses of batch number 0, 1, ... while the LoRA is on.
        layers: paths of linear layers in the denoiser.
        rank: the LoRA's rank in each of them.
        config: steps, rate and so on.
        ctx: the run.
        name: names the LoRA, its checkpoint and the generators.
        generator: draws the weights that it begins with.
    """
    with lora(ctx, name, layers, rank, generator, init=config.init, alpha=config.alpha) as student:
        train(losses, student.parameters, config, ctx=ctx, name=name)
        return {layer: delta for layer, delta in student.deltas().items() if isinstance(delta, LowRank)}


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean of |prediction - target|^2 over all entries, in float32."""
    return (prediction.float() - target.float()).square().mean()


def _rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up times one, or a half cosine that ends at a twentieth."""
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    if config.schedule == "constant":
        return rise
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


def _not_finite(name: str, step: int, parts: Losses, path: Path | None) -> str:
    bad = ", ".join(f"{key} = {value.item()}" for key, value in parts.items() if not math.isfinite(value.item()))
    kept = f" The last checkpoint is kept in {path.name}." if path is not None and path.exists() else ""
    problem = f"Training '{name}' stopped at step {step}: {bad or 'the sum is not finite'}."
    return f"{problem}{kept} Lower the rate with '-s method.lr=...'."


def _save(path: Path, step: int, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    with replacing(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, {"step": str(step)})


def _restore(path: Path, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into the parameters and the optimizer; a missing or unreadable one starts from zero."""
    try:
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception:
        return 0
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, slot = key.split(".", 2)
            state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
    return step
