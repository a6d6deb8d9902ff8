"""The world of `erasekit.testing` as a plugin file, for commands in processes of their own."""

from erasekit.testing.world import (
    Pull,
    Red,
    Words,
    register_backbones,
    register_evaluators,
    register_methods,
    register_tasks,
)

__all__ = ["Pull", "Red", "Words", "register_backbones", "register_evaluators", "register_methods", "register_tasks"]
