"""The loop behind every training of the mini models: a fixed number of steps, checkpointed and resumable."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Loss = Callable[[torch.Generator], torch.Tensor]


def cosine(step: int, steps: int, warmup: int, floor: float = 0.01) -> float:
    """Linear warm-up, then half a cosine down to `floor`."""
    progress = min(1.0, step / steps)
    return min(1.0, step / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def plateau(step: int, steps: int, warmup: int, floor: float = 0.01) -> float:
    """Linear warm-up, constant for half of the steps, then linear down to `floor`."""
    progress = min(1.0, step / steps)
    return min(1.0, step / warmup) * (1.0 if progress < 0.5 else floor + (1 - floor) * (1 - progress) * 2)


def fit(
    name: str,
    model: nn.Module,
    loss: Loss,
    *,
    steps: int,
    lr: float,
    folder: Path,
    schedule: Callable[[int, int, int], float] = cosine,
    warmup: int = 100,
    weight_decay: float = 0.01,
    ema_decay: float = 0.0,
    save_every: int = 500,
) -> nn.Module:
    """Minimise `loss` over `steps` steps of AdamW and return the model (its moving average if `ema_decay` > 0).

    Every step draws from a generator seeded by its number, so a killed training that is started again goes on as if
    nothing had happened. The checkpoint and the log lie in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = copy.deepcopy(model).requires_grad_(False) if ema_decay else model
    done = _restore(folder / f"{name}.checkpoint", model, average, optimizer)
    log = (folder / f"{name}.log.jsonl").open("a")
    began, recent = time.time(), []
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, warmup)
        value = loss(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema_decay:
            decay = min(ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
                mine.copy_(theirs)
        recent.append(value.item())
        if not math.isfinite(recent[-1]):
            raise RuntimeError(f"The loss of {name} is {recent[-1]} at step {step}: lower the learning rate.")
        if step == done + 20 or (step + 1) % 100 == 0:
            pace = (time.time() - began) / (step + 1 - done)
            row = {"step": step + 1, "loss": round(sum(recent[-100:]) / len(recent[-100:]), 5), "s_per_step": round(pace, 4)}
            print(json.dumps(row), file=log, flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(folder / f"{name}.checkpoint", step + 1, model, average, optimizer)
    return average.eval()


def _save(path: Path, step: int, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    partial = path.with_suffix(".partial")
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, partial, {"step": str(step)})
    partial.replace(path)


def _restore(path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    from safetensors import safe_open

    tensors = load_file(path)
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    model.load_state_dict(part("model."))
    average.load_state_dict(part("average."))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part("optimizer.").items():
        index, slot = key.split(".", 1)
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
