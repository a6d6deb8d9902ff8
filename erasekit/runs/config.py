"""From flags, a TOML file and overrides to one frozen plan of a run, with every mistake listed at once."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from erasekit.concepts import EMPTY_PROMPT, Kind
from erasekit.errors import UsageError, unknown
from erasekit.settings import merge, mistakes, read_toml

PARTS = (
    "method.key=value, backbone.key=..., protocol.key=..., task.key=..., components.name.key=..., evaluators.name.key=... "
    "or attacks.name.key=..."
)


class Options(BaseModel):
    """Settings of the parts of a run that differ from their defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: dict[str, Any] = Field(default_factory=dict, description="settings of the method")
    backbone: dict[str, Any] = Field(default_factory=dict, description="settings of the backbone")
    protocol: dict[str, Any] = Field(default_factory=dict, description="how images are drawn")
    task: dict[str, Any] = Field(default_factory=dict, description="what a task's TOML file says otherwise")
    components: dict[str, Any] = Field(
        default_factory=dict, description="settings of the method's components that have any, a table for each"
    )
    evaluators: dict[str, Any] = Field(default_factory=dict, description="settings of the task's evaluators, a table for each")
    attacks: dict[str, Any] = Field(default_factory=dict, description="settings of the attacks, a table for each")


class RunConfig(BaseModel):
    """What a user asks for. `--config` files have the same keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field("trace", description="the erasure method")
    backbone: str = Field("sd15-mini", description="the model to erase from")
    task: str = Field(
        "",
        description="what is measured, the task of that name in the backbone's domain; left out, objects of the mini domain "
        "or, for natural images, free",
    )
    concepts: tuple[str, ...] = Field(
        (), description="what to erase, together; empty: each of the task's concepts, one run each"
    )
    kind: Kind | None = Field(
        None, description="what the concepts are, where the task leaves it open: object, identity, style, nsfw or free"
    )
    neutral: str | None = Field(
        None,
        description=f"what takes the place of the concepts' words; '' drops them, '{EMPTY_PROMPT}' empties the prompt; left "
        "out, what the task says",
    )
    preserve: tuple[str, ...] = Field((), description="further things that must not change: things of the concepts' kind")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="the seed of everything random")
    limit: int | None = Field(None, ge=1, description="the most images per prompt set")
    preset: str = Field("", description="a named set of the method's settings")
    files: Literal["float32", "float16", "bfloat16"] = Field("float32", description="type of the erasure's tensors on disk")
    sample_every: int | None = Field(
        None,
        ge=0,
        description="training steps between images of validation prompts in samples/; 0 draws none; left out, five times on "
        "small models, never on others",
    )
    tracker: str = Field("", description="who follows the run: tensorboard, wandb, or another of accelerate's trackers")
    attacks: tuple[str, ...] = Field((), description="what tries to bring the concepts back, once they are erased")
    keep_texts: bool = Field(False, description="keep the texts that attacks find, and not only their hashes")
    options: Options = Field(
        default_factory=Options,
        description="settings of the method, its components, the backbone, the protocol, the task, evaluators and attacks",
    )


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Read `part.key=value` overrides; a value is a TOML value, or else text.

    Raises:
        UsageError: one of them has no "part.key=" in front.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or len(path) < 2 or not all(path):
            raise UsageError(f"Cannot read the setting '{text}'. Write it as one of {PARTS}.")
        place = options
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(f"The setting '{text}' contradicts an earlier one for '{part}'. Give one of them.")
        place[path[-1]] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def build(flags: Mapping[str, Any], *, file: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Put together a configuration: the file first, flags that were given over it, overrides over both.

    Raises:
        UsageError: lists every mistake.
    """
    values = read_toml(file, "config file", "Give --config the path of a TOML file.") if file else {}
    values |= {key: value for key, value in flags.items() if value not in (None, ())}
    values["options"] = merge(values.get("options", {}), parse_overrides(overrides))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n".join(mistakes(error, _unknown(RunConfig, "")))) from None


def _unknown(model: type[BaseModel], prefix: str) -> Callable[[str], str]:
    """The line for a setting that there is not."""
    names = [prefix + name for name in model.model_fields] + ([] if prefix else [f"options.{k}" for k in Options.model_fields])
    return lambda where: str(unknown("setting", where, names, "erasekit run --dry-run"))


def settings_of(model: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    """Validated settings; `prefix` ("method.") is how a user writes them.

    Raises:
        UsageError: lists every fault, one a line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n".join(mistakes(error, _unknown(model, prefix), prefix))) from None


def to_toml(config: RunConfig) -> str:
    """The configuration as a TOML file that `--config` reads back to the same configuration."""
    values = config.model_dump(mode="json", exclude_none=True, exclude={"options"})
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    for part, settings in config.options.model_dump(mode="json", exclude_none=True).items():
        if settings:
            lines += ["", f"[options.{part}]", *(f"{_toml(key)} = {_toml(value)}" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
