"""What is trained of the denoiser. All of its other tensors are the base's own: there is one copy of the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from erasekit.backbones.protocol import Backbone, Conditioning
from erasekit.erasures.deltas import Deltas, Dense
from erasekit.errors import UsageError
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.exchange import Exchanged

if TYPE_CHECKING:
    from erasekit_esd.method import EsdConfig

# What counts as the layers that read text: in a UNet the cross-attentions, in a transformer that attends to text and image
# together every attention, its text stream's `add_*` projections among them.
TEXT = {"unet": r"\.attn2\.", "dit": r"\.attn\."}
KEYS_AND_VALUES = {"unet": r"\.attn2\.to_[kv]$", "dit": r"\.attn\.(to_[kv]|add_[kv]_proj)$"}


@dataclass(frozen=True)
class Student:
    """The denoiser in training.

    Attributes:
        predict: its prediction for (x, tau, cond), at the guidance scale of the context that it was made with.
        parameters: what is trained, float32.
        deltas: what that has added to the base's weights by now, on the CPU.
    """

    predict: Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
    parameters: Sequence[torch.Tensor]
    deltas: Callable[[], Deltas]


def modules(backbone: Backbone, variant: str) -> list[str]:
    """The linear layers of a variant: x, x-strict, u or all.

    Raises:
        UsageError: the denoiser has none.
    """
    linear = [name for name, module in backbone.denoiser.named_modules() if isinstance(module, nn.Linear)]
    names = matching(linear, backbone.capabilities.family, variant)
    if not names:
        raise UsageError(f"Variant '{variant}' of ESD matches no linear layer of '{backbone.source}'.")
    return names


def matching(names: Iterable[str], family: str, variant: str) -> list[str]:
    """Those of a denoiser's linear layers that a variant trains."""
    pattern = {"x": TEXT, "x-strict": KEYS_AND_VALUES, "u": TEXT}.get(variant, {}).get(family, "")
    return [name for name in names if bool(re.search(pattern, name)) != (variant == "u")]


def full(ctx: RunContext, names: Sequence[str]) -> Student:
    """A student with whole weights of its own in some layers; they take the base's place only while it predicts."""
    exchanged = Exchanged(ctx)
    base = {name: ctx.backbone.weight(name) for name in names}
    own = {name: weight.float().clone().requires_grad_() for name, weight in base.items()}

    def deltas() -> Deltas:
        return {name: Dense((weight.detach() - base[name].float()).cpu()) for name, weight in own.items()}

    return Student(partial(exchanged.predict, own), list(own.values()), deltas)


@contextmanager
def lora(ctx: RunContext, names: Sequence[str], config: EsdConfig) -> Iterator[Student]:
    """A student with a LoRA on some layers; it is taken off at the end."""
    with AdapterBank(ctx.backbone) as bank:
        bank.add("esd", names, config.rank, ctx.generator("esd/init"), init=config.init, alpha=config.alpha)
        yield Student(ctx.predict, bank.train_only("esd"), lambda: bank.deltas("esd"))
