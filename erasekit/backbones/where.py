"""Where a registered model is had: the folder of one that is shipped, the hub's id of any other."""

from __future__ import annotations

from pathlib import Path

from erasekit.errors import UsageError
from erasekit.registration.plugins import Registries, default


def where(name: str, registries: Registries | None = None) -> str:
    """What diffusers' `from_pretrained` takes for a backbone: the folder of a shipped model, or an id on the hub.

    Args:
        name: the registered name, e.g. "sd15-mini".
        registries: what names stand for; what is installed, if left out.

    Raises:
        UsageError: nobody registered the name, or the backbone has no model of its own.
    """
    path = str(getattr((registries or default()).backbones.get(name), "path", ""))
    if not path:
        raise UsageError(f"'{name}' has no model of its own. Name yours with -s backbone.path=FOLDER.")
    return path


def shipped(name: str) -> bool:
    """Whether a backbone's own model is a folder on this machine, as those are that plugins bring."""
    return Path(where(name)).is_absolute()
