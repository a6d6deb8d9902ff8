"""What a registered class owes before anything is loaded: its base, and the functions that it has to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from erasekit.errors import UsageError


def owed(what: str, found: Any, base: type, functions: Sequence[str]) -> None:
    """Refuse a class that does not derive from its base, or lacks a function.

    Args:
        what: what it is, for the error, e.g. "The method 'mine'".
        found: what is registered.
        base: what it derives from.
        functions: those that the base does not write.

    Raises:
        UsageError: says what is missing.
    """
    if not (isinstance(found, type) and issubclass(found, base)):
        called = getattr(found, "__name__", type(found).__name__)
        raise UsageError(f"{what} is '{called}', which does not derive from erasekit.{base.__name__}. Derive it.")
    for name in functions:
        if getattr(found, name) is getattr(base, name):
            raise UsageError(f"{what} is '{found.__name__}', which has no '{name}'. Write it: see erasekit.{base.__name__}.")
    wanted, config = getattr(base, "Config", object), getattr(found, "Config", object)
    if not (isinstance(config, type) and issubclass(config, wanted)):
        raise UsageError(f"{what} has settings that do not derive from {wanted.__name__}. Derive its 'Config' from that.")
