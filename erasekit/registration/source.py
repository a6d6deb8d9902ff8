"""Which code stands behind a name: of what does not come with erasekit a digest, since an author may forget a version."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path


def source_digest(module: str) -> str:
    """Sixteen hex digits over the source of the package that a module is in, or over the module itself if it is in none.

    "" for what comes with erasekit, whose versions say what has changed, and for what has no source file.
    """
    parts = module.split(".")
    if parts[0] in _own():
        return ""
    for end in range(1, len(parts) + 1):  # distributions share a namespace package
        try:
            spec = importlib.util.find_spec(".".join(parts[:end]))
        except (ImportError, ValueError):  # of a notebook, say
            return ""
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            file = Path(spec.origin)
            files = sorted(file.parent.rglob("*.py")) if spec.submodule_search_locations else [file]
            return hashlib.sha256("".join(map(_hash, files)).encode()).hexdigest()[:16]
    return ""


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@cache
def _own() -> frozenset[str]:
    """The packages of erasekit's distribution."""
    points = importlib.metadata.entry_points(group="erasekit")
    return frozenset({"erasekit", *(p.module.partition(".")[0] for p in points if p.dist and p.dist.name == "erasekit")})
