"""An erasure in another form: what an exporter is asked for, and what it says of the file that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from erasekit.backbones.protocol import Backbone
from erasekit.erasures.deltas import Deltas
from erasekit.erasures.erasure import Erasure
from erasekit.errors import UsageError


class Exported(NamedTuple):
    """What was written.

    Attributes:
        path: the file or the folder.
        costs: what the form costs, relative to the edit: `rank` (of cutting it) and `rounding` (of the type).
        load: how it is loaded: lines of Python, or where to put it.
    """

    path: Path
    costs: Mapping[str, float]
    load: str


@dataclass(frozen=True)
class Order:
    """What an exporter is asked to write.

    Attributes:
        erasure: its deltas as they are to be written: of the concepts, of the strength and of the rank that were asked for.
        record: the content of its erasure.json.
        out: where to; a suffix says that a single file is wanted.
        dtype: type of the tensors, None for what is usual.
        kind: the class of its backbone.
        config: how that is loaded.
        cut: what the rank costs, |cut - Delta| / |Delta|.
    """

    erasure: Erasure
    record: Mapping[str, Any]
    out: Path
    dtype: torch.dtype | None
    kind: Any
    config: Any
    cut: float = 0.0

    @cached_property
    def deltas(self) -> Deltas:
        """All deltas in one."""
        return self.erasure.total()

    def backbone(self) -> Backbone:
        """The base, checked to be the one that the erasure was made for; its weights are loaded when they are used.

        Raises:
            UsageError: it is another one.
            EnvironmentProblem: it cannot be loaded.
        """
        base: Backbone = self.kind.load(self.config)
        if base.fingerprint(self.record["base"]["modules"]) != self.record["base"]["sha256"]:
            raise UsageError(f"The erasure was made for {self.record['base']['repo']}, not for '{base.source}'. Name that one.")
        return base

    def costs(self, rounding: float) -> dict[str, float]:
        """What the form costs, named."""
        return {"rank": self.cut, "rounding": rounding}


class Exporter:
    """A form that an erasure can be written in; subclasses are what `register_exporters` registers.

    Attributes:
        suffix: what a file or folder is called after the concepts and the backbone, where the user gives no name.
    """

    suffix: ClassVar[str] = ""

    def write(self, order: Order) -> Exported:
        """Write the erasure; nothing is at `order.out`.

        Raises:
            ErasekitError: it cannot be written in this form; says why.
        """
        raise NotImplementedError
