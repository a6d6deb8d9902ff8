"""Erase concepts from text-to-image models, and measure what became of them.

The public names are loaded on first use: importing `erasekit` imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from erasekit.hookspecs import hookimpl

__version__ = "0.1.0"

_PUBLIC = {
    "run": "erasekit.runner",
    "RunConfig": "erasekit.config",
    "RunResult": "erasekit.results",
    "Concept": "erasekit.concepts",
    "Method": "erasekit.method",
    "MethodConfig": "erasekit.method",
    "RunContext": "erasekit.method",
    "Backbone": "erasekit.backbone",
    "BackboneConfig": "erasekit.backbone",
    "Capabilities": "erasekit.backbone",
    "Conditioning": "erasekit.backbone",
    "Site": "erasekit.backbone",
    "Task": "erasekit.tasks",
    "Prompt": "erasekit.tasks",
    "Protocol": "erasekit.tasks",
    "Evaluator": "erasekit.evaluators",
    "Erasure": "erasekit.erasure",
    "load_into": "erasekit.erasure",
}

__all__ = ["__version__", "hookimpl", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Load a public name on first use.

    Raises:
        AttributeError: the name is not public.
    """
    if name not in _PUBLIC:
        raise AttributeError(f"module 'erasekit' has no attribute '{name}'")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
