"""Gradient checkpointing of a denoiser that a forward pass found changed: its blocks are run again as they were then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def checkpointed(denoiser: Any, run: Callable[..., Any]) -> Iterator[None]:
    """Let `run(block, *inputs)` run the blocks whose activations a diffusers model recomputes; without checkpointing nothing.

    The backward pass runs a block once more, long after the forward pass and whatever was changed for it are over. `run`
    sees to it that the second time is like the first.
    """
    if not denoiser.is_gradient_checkpointing:
        yield
        return
    denoiser.enable_gradient_checkpointing(run)
    try:
        yield
    finally:
        denoiser.enable_gradient_checkpointing()
