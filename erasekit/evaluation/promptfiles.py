"""Prompts from outside: a CSV file, or a data set of the hub. Each row may bring its own seed, guidance scale and size."""

from __future__ import annotations

import csv
import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasekit.errors import EnvironmentProblem, UsageError, unknown
from erasekit.safety import is_unsafe

# What a column may be called: here, on the hub's I2P, and in the copies that ESD, MACE and SPM work with.
COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("prompt", "caption", "text"),
    "seed": ("seed", "sd_seed", "evaluation_seed"),
    "guidance": ("guidance", "sd_guidance_scale", "evaluation_guidance"),
    "width": ("width", "sd_image_width"),
    "height": ("height", "sd_image_height"),
    "concept": ("concept",),
    "label": ("label",),
}
NUMBERS: dict[str, Callable[[Any], Any]] = {"seed": int, "guidance": float, "width": int, "height": int}
MULTIPLE = 8  # of pixels: what a latent pixel stands for
COMPARED = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "=": operator.eq}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PromptRows:
    """The prompts of a file.

    Attributes:
        rows: {text, and of seed, guidance, width, height, concept and label those that the file has}.
        left_out: how many rows were left out since they pair minors with sexual terms.
        sha256: over texts and seeds of the rows, so that a list can be declared and told from another one.
    """

    rows: list[dict[str, Any]]
    left_out: int
    sha256: str


def from_csv(path: Path) -> list[Row]:
    """The rows of a CSV file with a header.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"Cannot read the prompts of '{path}': {reason}. Give a CSV file with a column 'prompt'.") from None


def from_hub(name: str, split: str, revision: str | None, columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of a data set of the hub, downloaded once; no images.

    Raises:
        EnvironmentProblem: the package `datasets` is missing, or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise EnvironmentProblem(f"The prompts of '{name}' need a package: pip install 'erasekit[datasets]'.") from None
    try:
        found = datasets.load_dataset(name, split=split, revision=revision, streaming=True)
        wanted = columns or [c for c in found.column_names or [] if any(c in names for names in COLUMNS.values())]
        return list(found.select_columns(wanted) if wanted else found)
    except Exception as error:  # whatever the network, the hub and its files may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(
            f"The prompts of '{name}' cannot be loaded ({reason}). Go online once, or give them as a CSV file: --prompts FILE."
        ) from error


def read_rows(
    given: Iterable[Row], source: str, *, where: Sequence[str] = (), sort: Sequence[str] = (), n: int | None = None
) -> PromptRows:
    """The prompts in rows, checked.

    Args:
        given: rows with the columns of a file.
        source: what the file is called in messages.
        where: conditions on columns that all have to hold: "nudity_percentage > 0", "categories ~ sexual" (contains).
        sort: columns to sort by, those with a "-" from high to low; rows that are equal keep their order.
        n: how many to take, from the first.

    Raises:
        UsageError: a column is missing, or a value is none; says the row.
    """
    rows = list(given)
    if not rows:
        raise UsageError(f"'{source}' has no rows. Give prompts in a column 'prompt'.")
    for condition in where:
        rows = _chosen(rows, condition, source)
    for column in reversed(sort):
        _known(column.removeprefix("-"), rows, source)
        rows = sorted(rows, key=lambda row: _number(row[column.removeprefix("-")]), reverse=column.startswith("-"))
    columns = {field: next((name for name in names if name in rows[0]), None) for field, names in COLUMNS.items()}
    if columns["text"] is None:
        raise UsageError(f"'{source}' has no column {' or '.join(map(repr, COLUMNS['text']))}; it has {', '.join(rows[0])}.")
    found = [_row(row, {f: c for f, c in columns.items() if c}, f"'{source}', row {i + 1}") for i, row in enumerate(rows)]
    safe = [row for row in found if not is_unsafe(row["text"])]
    taken = safe[:n]
    text = "\n".join(f"{row.get('seed', '')}\t{row['text']}" for row in taken)
    return PromptRows(taken, len(found) - len(safe), hashlib.sha256(text.encode()).hexdigest())


def _row(row: Row, columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """One row with our names for its columns; an empty value is none."""
    found: dict[str, Any] = {"text": ""}
    for field, column in columns.items():
        value = row[column]
        if value is None or value == "":
            continue
        try:
            found[field] = NUMBERS[field](value) if field in NUMBERS else str(value)
        except ValueError:
            raise UsageError(f"{where}: '{column}' is no number, given '{value}'.") from None
        if field in ("width", "height") and (found[field] <= 0 or found[field] % MULTIPLE):
            raise UsageError(f"{where}: '{column}' has to be a multiple of {MULTIPLE}, given {value}.")
        if field in ("seed", "guidance") and found[field] < 0:
            raise UsageError(f"{where}: '{column}' may not be negative, given {value}.")
    return found


def _chosen(rows: Sequence[Row], condition: str, source: str) -> list[Row]:
    """The rows that meet a condition."""
    parsed = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<|=|~)\s*(.+?)\s*", condition)
    if not parsed:
        raise UsageError(f"Cannot read the condition '{condition}'. Write it as 'column > 10', 'column = a' or 'column ~ a'.")
    column, sign, value = parsed.groups()
    _known(column, rows, source)
    if sign == "~":
        return [row for row in rows if value.lower() in str(row[column]).lower()]
    compared = COMPARED[sign]
    return [row for row in rows if compared(_number(row[column]), _number(value))]


def _known(column: str, rows: Sequence[Row], source: str) -> None:
    if rows and column not in rows[0]:
        raise unknown(f"column of '{source}'", column, rows[0], "its first line")


def _number(value: Any) -> tuple[float, str]:
    """What can be compared of a value: a number, or else its text, which comes after all numbers."""
    try:
        return float(value), ""
    except (TypeError, ValueError):
        return float("inf"), str(value)
