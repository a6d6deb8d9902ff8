"""Erase concepts from text-to-image models, and measure what became of them.

The public names are loaded on first use: importing `erasekit` imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from erasekit.registration.hookspecs import hookimpl

__version__ = "0.1.0"

_PUBLIC = {
    "run": "erasekit.runs.runner",
    "RunConfig": "erasekit.runs.config",
    "RunResult": "erasekit.evaluation.results",
    "Concept": "erasekit.concepts",
    "Method": "erasekit.methods.method",
    "MethodConfig": "erasekit.methods.method",
    "Component": "erasekit.methods.component",
    "RunContext": "erasekit.methods.context",
    "Backbone": "erasekit.backbones.protocol",
    "BackboneConfig": "erasekit.backbones.protocol",
    "Capabilities": "erasekit.backbones.protocol",
    "Conditioning": "erasekit.backbones.protocol",
    "Site": "erasekit.backbones.protocol",
    "Task": "erasekit.evaluation.tasks",
    "Prompt": "erasekit.evaluation.tasks",
    "Protocol": "erasekit.evaluation.tasks",
    "Evaluator": "erasekit.evaluation.evaluators",
    "Attack": "erasekit.attacks.attack",
    "AttackConfig": "erasekit.attacks.attack",
    "Draw": "erasekit.attacks.draw",
    "Erasure": "erasekit.erasures.erasure",
    "load": "erasekit.runs.loading",
    "load_into": "erasekit.erasures.loading",
    "export": "erasekit.runs.exporting",
    "where": "erasekit.backbones.where",
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
