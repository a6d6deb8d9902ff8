"""Settings: their base class, read from TOML, one table laid over another, and a line for every mistake."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from erasekit.errors import UsageError
from erasekit.texts import one_line

LARGEST = 1e9  # a setting that is larger is a slip: it would take all memory, or last for ever


class Settings(BaseModel):
    """Frozen settings; what a user gives is checked when they are made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _sensible(cls, value: Any) -> Any:
        for part in _parts(value):
            if isinstance(part, str):
                one_line(part)
            elif isinstance(part, int | float) and abs(part) > LARGEST:
                raise ValueError(f"a number beyond {LARGEST:.0e} makes no sense here")
        return value


def _parts(value: Any) -> Iterator[Any]:
    """The values in a value, however deep."""
    inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    if isinstance(inner, list | tuple | set | frozenset):
        for part in inner:
            yield from _parts(part)
    else:
        yield value


def read_toml(path: Path, what: str, instead: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: what it is, for the message ("config file").
        instead: what to do where there is none.

    Raises:
        UsageError: there is none, or it is not TOML; says the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"No {what} '{path}'. {instead}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the {what} '{path}': {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"'{path}' is not TOML: {error}.") from None
    except RecursionError:
        raise UsageError(f"'{path}' is nested too deeply. Give fewer brackets within brackets.") from None


def layered(defaults: Mapping[str, Mapping[str, Any]], family: str, name: str, *more: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a backbone's family, those of its name over them, then `more`, each over what was before it."""
    values: dict[str, Any] = {}
    for layer in (defaults.get(family, {}), defaults.get(name, {}), *more):
        values = merge(values, layer)
    return values


def merge(base: Any, over: Any) -> Any:
    """`base` with the values of `over`, tables within tables merged too."""
    if not isinstance(base, dict):
        return base  # left for validation to name
    if not isinstance(over, Mapping):
        return over
    both = {k: merge(base[k], v) if isinstance(base.get(k), dict) and isinstance(v, dict) else v for k, v in over.items()}
    return base | both


def mistakes(error: ValidationError, unknown_key: Callable[[str], str], prefix: str = "") -> list[str]:
    """One line per fault that pydantic found.

    Args:
        error: what it found.
        unknown_key: the line for a key that there is not.
        prefix: stands before the keys, as a user writes them ("method.").
    """
    lines = []
    for fault in error.errors(include_url=False):
        where = prefix + ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            lines.append(unknown_key(where))
            continue
        said = fault["msg"].removeprefix("Value error, ")
        given = "" if fault["type"] in ("missing", "value_error") else f", given {fault['input']!r}"
        lines.append(f"Setting '{where}': {said[0].lower()}{said[1:]}{given}." if where else f"{said}.")
    return lines
