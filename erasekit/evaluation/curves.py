"""Results that are more than one number: curves over an erasure's strength, and how much erasing one thing harms another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from erasekit.atomic import replacing
from erasekit.errors import UsageError

STRENGTH, INTERFERENCE = "strength.json", "interference.json"  # the files in a run's folder
Content = TypeVar("Content", bound="Measured")


class Measured(BaseModel):
    """Base of both files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls: type[Content], path: Path) -> Content | None:
        """Read what `write` wrote; None if there is no such file.

        Raises:
            UsageError: it is not one.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise UsageError(f"'{path}' is not a {path.name} of this version: {first}. Measure it again.") from error


class Point(BaseModel):
    """One number of a curve.

    Attributes:
        strength: what the erasure's deltas are multiplied by: 0 is the base, 1 the erasure as it is.
        value: of the curve's metric there.
        ci95: a 95 % interval of it, where there is a sound one.
        n: how many images it rests on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strength: float = Field(allow_inf_nan=False)
    value: float = Field(allow_inf_nan=False)
    ci95: tuple[float, float] | None = None
    n: int = Field(ge=0)


class Curve(BaseModel):
    """A metric over strengths, in rising order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    higher_is_better: bool
    points: tuple[Point, ...]

    @model_validator(mode="after")
    def _rises(self) -> Self:
        strengths = [point.strength for point in self.points]
        if not strengths or strengths != sorted(set(strengths)):
            raise ValueError("a curve needs points in rising order of strength")
        return self


class Strength(Measured):
    """The content of strength.json: what is left of the concept and of the rest at each strength of the erasure.

    Attributes:
        concepts: whose strength is varied, all together.
        curves: e.g. of `acc_e` (the concept's presence) and of `acc_s` (what has to stay).
    """

    concepts: tuple[str, ...]
    curves: tuple[Curve, ...]


class Interference(Measured):
    """The content of interference.json: which erasure takes what else with it.

    Attributes:
        metric: what `values` are, e.g. `seen`: the share of images asking for a thing that show it.
        erased: a name for each row: what was erased.
        asked: a name for each column: what the images were asked for.
        values: a row for each erasure; None where it was not measured.
        base: the same of the unedited model, a value for each column, where it is known.
        images: how many images each of `values` rests on, where it is known.
    """

    metric: str = "seen"
    erased: tuple[str, ...]
    asked: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    base: tuple[float | None, ...] | None = None
    images: tuple[tuple[int, ...], ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        counts = self.images if self.images is not None else self.values
        columns = {len(row) for row in (*self.values, *counts, *([self.base] if self.base else []))}
        if {len(self.values), len(counts)} != {len(self.erased)} or columns - {len(self.asked)}:
            raise ValueError(f"{len(self.erased)} x {len(self.asked)} names need as many values")
        return self
