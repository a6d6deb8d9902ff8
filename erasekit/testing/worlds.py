"""What the checks share: the tiny models on disk, registries with their world, and one-line failures."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from erasekit.registration import plugins
from erasekit.registration.plugins import Registries
from erasekit.testing import tiny, tiny_flux, tiny_flux2, tiny_sd3, tiny_xl

BACKBONES = ("tiny", "tiny-flux")  # what methods and attacks are tried on: one of each family
Plugins = str | Path | Sequence[str | Path]
SAVED: dict[str, Callable[[Path], Path]] = {
    "tiny": tiny.save_pipeline,
    "tiny-flux": tiny_flux.save_pipeline,
    "tiny-xl": tiny_xl.save_pipeline,
    "tiny-sd3": tiny_sd3.save_pipeline,
    "tiny-flux2": tiny_flux2.save_pipeline,
    "tiny-flux2-base": partial(tiny_flux2.save_pipeline, distilled=False),
}


def owe(condition: object, line: str) -> None:
    """Raise an AssertionError with a line, unless a condition holds."""
    if not condition:
        raise AssertionError(line)


def owe_none(found: Sequence[Any], line: str) -> None:
    """Raise an AssertionError if there are any; `{}` in the line is the first of them."""
    if found:
        raise AssertionError(line.replace("{}", str(found[0])))


@cache
def tiny_folder(name: str = "tiny") -> Path:
    """A diffusers folder of a tiny model with random weights, made once and deleted when the process ends.

    Args:
        name: `tiny` (the classes of Stable Diffusion 1.x), `tiny-xl` (of XL), `tiny-sd3` (of 3.5), `tiny-flux` (of FLUX.1),
            `tiny-flux2` or `tiny-flux2-base` (of FLUX.2 [klein], distilled and not).
    """
    owe(name in SAVED, f"There is no tiny model '{name}'. Choose one of: {', '.join(SAVED)}.")
    folder = Path(tempfile.mkdtemp(prefix="erasekit-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return SAVED[name](folder / name)


def with_world(plugin: Plugins = ()) -> Registries:
    """What is installed, the given plugin files, and the tiny world (`erasekit.testing.world`).

    Raises:
        AssertionError: a given file is broken; says why.
    """
    files = [plugin] if isinstance(plugin, str | Path) else list(plugin)
    registries = plugins.load(files, modules=(*plugins.BUILT_IN, "erasekit.testing.world"))
    given = {Path(file).stem for file in files}
    for info in registries.broken():
        owe(info.name not in given, f"The plugin '{info.name}' is broken: {info.error}")
    return registries


def base_settings(name: str) -> dict[str, Any]:
    """Settings that load a backbone for a check: on the CPU, in float32, a tiny one from its folder."""
    folder = {"path": str(tiny_folder(name))} if name in SAVED else {}
    return {"device": "cpu", "dtype": "float32", **folder}


def check_fields(what: str, config: type[BaseModel]) -> None:
    """See that every setting says what it is: descriptions are the documentation."""
    bare = [name for name, field in config.model_fields.items() if not field.description]
    owe_none(bare, f"{what}: the setting '{{}}' has no description. Write Field(..., description='...').")


def check_settings(what: str, config: type[BaseModel], values: Mapping[str, Any]) -> None:
    """See that a named set of settings is one of these settings."""
    try:
        config(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise AssertionError(f"{what}: '{key}' is wrong: {fault['msg']}, given {fault['input']!r}.") from error
