"""Prompts from outside: a CSV file, or a data set of the hub. Each row may bring its own seed, guidance scale and size."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import itertools
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
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
MULTIPLE = 8  # of pixels: what a latent pixel stands for
MOST = {"seed": 2**63 - 1, "guidance": 1000, "width": 8192, "height": 8192}
DELIMITERS = ",;\t"
COMPARED = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "=": operator.eq}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PromptRows:
    """The prompts of a file.

    Attributes:
        rows: {text, and of seed, guidance, width, height, concept and label those that the file has}.
        left_out: how many rows were left out since they pair minors with sexual terms.
        empty: how many prompts are empty.
        repeated: how many rows have the prompt and the seed of one before, and so its image again.
        sha256: over texts and seeds of the rows, so that a list can be declared and told from another one.
    """

    rows: list[dict[str, Any]]
    left_out: int
    sha256: str
    empty: int = 0
    repeated: int = 0


def from_csv(path: Path) -> list[Row]:
    """The rows of a CSV file with a header, as programs write it: with commas, Excel's semicolons or tabs; blank rows are none.

    Raises:
        UsageError: it cannot be read, or a row has more values than the header.
    """
    try:
        text = _decoded(path.read_bytes())
        delimiter = next((d for d in DELIMITERS if _has_prompts(text, d)), ",")
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header, *rows = [[value.strip() for value in line] for line in lines if any(map(str.strip, line))] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "Give a CSV file in UTF-8 with a column 'prompt'."
        raise UsageError(f"Cannot read the prompts of '{path}': {reason}. {advice}") from None
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UsageError(f"'{path.name}' has the column '{twice[0]}' twice. Leave one out.")
    for i, row in enumerate(rows):
        if len(row) > len(header):
            line = f"'{path.name}', row {i + 1}: {len(row)} values for {len(header)} columns"
            raise UsageError(f"{line}. Put a prompt that has a '{delimiter}' in double quotes.")
    return [dict(itertools.zip_longest(header, row)) for row in rows]


def _decoded(content: bytes) -> str:
    """Text in UTF-8, or in Excel's "Unicode text", without the line that tells Excel the delimiter."""
    text = content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    return re.sub(r"\A\ufeff?(sep=.\r?\n)?", "", text)


def _has_prompts(text: str, delimiter: str) -> bool:
    """Whether the first line has a column of prompts, read with a delimiter."""
    header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    return any(name.strip().lower() in COLUMNS["text"] for name in header)


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
    known = {name.lower(): name for name in rows[0]}
    columns = {field: next((known[name] for name in names if name in known), None) for field, names in COLUMNS.items()}
    if columns["text"] is None:
        raise UsageError(f"'{source}' has no column {' or '.join(map(repr, COLUMNS['text']))}; it has {', '.join(rows[0])}.")
    found = [_row(row, {f: c for f, c in columns.items() if c}, f"'{source}', row {i + 1}") for i, row in enumerate(rows)]
    safe = [row for row in found if not is_unsafe(row["text"])]
    taken = safe[:n]
    text = "\n".join(f"{row.get('seed', '')}\t{row['text']}" for row in taken)
    seeded = [(row["text"], row["seed"]) for row in taken if "seed" in row]
    counts = {"empty": sum(not row["text"].strip() for row in taken), "repeated": len(seeded) - len(set(seeded))}
    return PromptRows(taken, len(found) - len(safe), hashlib.sha256(text.encode()).hexdigest(), **counts)


def _row(row: Row, columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """One row with our names for its columns; an empty value is none."""
    found: dict[str, Any] = {"text": ""}
    for field, column in columns.items():
        value = row[column]
        if value is None or value == "":
            continue
        found[field] = _value(field, value, f"{where}: '{column}'")
    return found


def _value(field: str, value: Any, where: str) -> Any:
    """A value of a column, checked."""
    if field not in MOST:
        return str(value)
    plain = str(value).strip().replace(",", ".")  # Excel's decimals, where lists are separated by semicolons
    try:
        number = float(plain)
    except ValueError:
        raise UsageError(f"{where} is no number, given '{value}'.") from None
    if number < 0:
        raise UsageError(f"{where} may not be negative, given {value}.")
    if not number <= MOST[field]:
        raise UsageError(f"{where} may be at most {MOST[field]}, given {value}.")
    if field == "guidance":
        return number
    if not re.fullmatch(r"\d+(\.0*)?", plain):
        raise UsageError(f"{where} has to be a whole number, given '{value}'.")
    whole = int(plain.partition(".")[0])
    if field in ("width", "height") and (not whole or whole % MULTIPLE):
        raise UsageError(f"{where} has to be a multiple of {MULTIPLE}, given {value}.")
    return whole


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
