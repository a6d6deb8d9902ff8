"""How fast a device works through layers like a denoiser's: what a plan's time is estimated from where nothing was measured."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import nn

PATIENCE_S = 0.3


def tflops(device: torch.device, dtype: torch.dtype, family: str) -> float:
    """TFLOP that a device does in a second of a denoiser; measured in about a second, on two of its layers.

    A `transformer` is taken for a linear layer of FLUX.1's width. In a `unet` half of the work is convolutions. On a CPU, where
    it was compared with the whole denoiser of Stable Diffusion, this was 25 % too fast.

    Args:
        device: where.
        dtype: of weights and activations.
        family: `unet` or `transformer`.
    """
    linear = _linear(device, dtype)
    return 2 / (1 / linear + 1 / _convolution(device, dtype)) if family == "unet" else linear


@cache
def _linear(device: torch.device, dtype: torch.dtype, width: int = 3072) -> float:
    tokens = 256 if device.type == "cpu" else 4096
    return _measured(nn.Linear(width, 4 * width), torch.randn(tokens, width), 8 * width * width * tokens, device, dtype)


@cache
def _convolution(device: torch.device, dtype: torch.dtype, width: int = 320, side: int = 64) -> float:
    images = 1 if device.type == "cpu" else 8
    layer = nn.Conv2d(width, width, 3, padding=1)
    flop = 18 * width * width * side * side * images
    return _measured(layer, torch.randn(images, width, side, side), flop, device, dtype)


@torch.no_grad()
def _measured(layer: Any, x: torch.Tensor, flop: int, device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP in a second of a layer."""
    layer, x = layer.to(device, dtype), x.to(device, dtype)
    _seconds(layer, x, 1)  # the first call prepares
    calls = max(1, int(PATIENCE_S / _seconds(layer, x, 1)))
    return flop * calls / _seconds(layer, x, calls) / 1e12


def _seconds(layer: Any, x: torch.Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        layer(x)
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
    return max(time.perf_counter() - start, 1e-9)
