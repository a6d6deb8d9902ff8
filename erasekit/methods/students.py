"""What a method trains of the denoiser. All of its other tensors are the base's: there is one copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from erasekit.backbones.protocol import Conditioning
from erasekit.erasures.deltas import Deltas, Dense
from erasekit.methods.adapters import AdapterBank, Init
from erasekit.methods.context import RunContext
from erasekit.methods.exchange import Exchanged


@dataclass(frozen=True)
class Student:
    """The denoiser in training.

    Attributes:
        predict: its prediction for (x, tau, cond), at the guidance scale of the context that it was made with.
        layers: the linear layers that it changes.
        parameters: what is trained, float32; of whole weights and changes one for each layer.
        deltas: what that has added to the base's weights by now, on the CPU.
    """

    predict: Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
    layers: Sequence[str]
    parameters: Sequence[torch.Tensor]
    deltas: Callable[[], Deltas]


def whole(ctx: RunContext, layers: Sequence[str]) -> Student:
    """A student with weights of its own in some layers; they take the base's place only while it predicts."""
    exchanged = Exchanged(ctx)
    base = {name: ctx.backbone.weight(name) for name in layers}
    own = {name: weight.float().clone().requires_grad_() for name, weight in base.items()}

    def deltas() -> Deltas:
        return {name: Dense((weight.detach() - base[name].float()).cpu()) for name, weight in own.items()}

    return Student(partial(exchanged.predict, own), layers, list(own.values()), deltas)


def masked(ctx: RunContext, layers: Sequence[str], mask: Mapping[str, torch.Tensor]) -> Student:
    """A student with `weight + mask * change` in some layers, the changes zero at first.

    Args:
        ctx: the run.
        layers: linear layers of the denoiser.
        mask: {layer: which entries count}, looked up at each prediction; layers that it leaves out count whole.
    """
    exchanged = Exchanged(ctx)
    base = {name: ctx.backbone.weight(name) for name in layers}
    change = {name: torch.zeros_like(weight, dtype=torch.float32).requires_grad_() for name, weight in base.items()}

    def own(name: str) -> torch.Tensor:
        return change[name] * mask[name] if name in mask else change[name]

    def predict(x: torch.Tensor, tau: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return exchanged.predict({name: base[name].float() + own(name) for name in layers}, x, tau, cond)

    def deltas() -> Deltas:
        return {name: Dense(own(name).detach().cpu().clone()) for name in layers}

    return Student(predict, layers, list(change.values()), deltas)


@contextmanager
def lora(
    ctx: RunContext,
    name: str,
    layers: Sequence[str],
    rank: int,
    generator: torch.Generator,
    *,
    init: Init = "uniform",
    alpha: float | None = None,
) -> Iterator[Student]:
    """A student with a LoRA on some layers, which is taken off at the end; see `AdapterBank.add`."""
    with AdapterBank(ctx.backbone) as bank:
        bank.add(name, layers, rank, generator, init=init, alpha=alpha)
        yield Student(ctx.predict, layers, bank.train_only(name), lambda: bank.deltas(name))
