"""The tiny world without its method: an erasure is measured, drawn with and shown without the plugin that made it."""

from erasekit.testing.world import register_backbones, register_evaluators, register_tasks

__all__ = ["register_backbones", "register_evaluators", "register_tasks"]
