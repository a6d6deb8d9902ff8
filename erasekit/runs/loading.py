"""`erasekit.load`: an erasure into a pipeline, whatever its kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasekit.erasures.loading import load_into
from erasekit.erasures.strength import Strength
from erasekit.registration.plugins import default


def load(
    pipe: Any, folder: Path | str, concepts: Sequence[str] | None = None, *, strength: Strength | None = None
) -> list[str]:
    """Load an erasure into a diffusers pipeline of its base: `load_into`, with the schemes of the installed plugins.

    Args:
        pipe: the pipeline.
        folder: the erasure.
        concepts: load these, an adapter each; all of them as one adapter (`all`) if left out.
        strength: how strongly it acts: 0 is the base, 1 the erasure as it is; `{"cat": 0.5}` is of one concept.

    Returns:
        The adapters' names, all active; none of an erasure that changes no weights.

    Raises:
        ErasekitError: see `load_into`.
    """
    return load_into(pipe, folder, concepts, strength=strength, component=default().components.get)
