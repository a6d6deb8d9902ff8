"""The card of an erasure: what was measured and how, how to load it, and what it does not promise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from erasekit.erasures.remains import Remains
from erasekit.errors import ErasekitError
from erasekit.evaluation.results import RunResult, meaning, number
from erasekit.registration.plugins import default

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
REMOVABLE = (
    "No weight is changed: this erasure acts only while images are drawn by a pipeline that has loaded it. Whoever leaves it "
    "out has the base model, concept and all."
)
NOT_PROMISED = (
    "The numbers hold for the prompts, seeds, sampler and evaluators that are named with them, and for no others.",
    "An erased concept is hard to reach, not impossible: optimised prompts, learned embeddings, image prompts or a little "
    "fine-tuning can bring it back.",
    "The file is an edit on top of the base: whoever takes it off has the base model again, concept and all.",
    "It is no proof that the training data have left the weights, in any legal sense.",
    "Evaluators err. A share of 0 means that they found nothing in so many images: look at the interval, and at them.",
)


@cache
def templates() -> Environment:
    """The templates of reports and cards: HTML is escaped, an undefined name is an error."""
    return Environment(
        loader=PackageLoader("erasekit", "templates"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def hub_id(record: Mapping[str, Any]) -> str:
    """Where the hub has the base of an erasure: what it was made on, or, of a local one, what its backbone has by default.

    "" for a model that the hub has not, or whose plugin is not installed.
    """
    base: str = record["base"]["repo"]
    if "/" in base:
        return base
    with suppress(ErasekitError):
        path = str(getattr(default().backbones.get(record["backbone"]), "path", ""))
        return path if HUB_ID.fullmatch(path) else ""
    return ""


def load_lines(record: Mapping[str, Any], folder: str = "erasure") -> str:
    """The lines of Python that load an erasure: in plain diffusers, unless it acts while images are drawn.

    Args:
        record: the content of erasure.json.
        folder: what to write for the folder that holds it.
    """
    base, hub = record["base"]["repo"], hub_id(record)
    where = "" if base == hub else f"  # made on the local {base!r}: load that, if it is another model"
    if not hub:
        where = "  # the folder of the base model"
    imports, load = "", f'pipe.load_lora_weights("{folder}", weight_name="all.safetensors", adapter_name="erased")\n'
    if record.get("kind") == "guidance":
        imports, load = "from erasekit import load\n", f'load(pipe, "{folder}")\n'
    return (
        f"from diffusers import DiffusionPipeline\n{imports}\n"
        f'pipe = DiffusionPipeline.from_pretrained("{hub or base}"){where}\n'
        f"{load}"
        'image = pipe("a photo of a dog").images[0]\n'
    )


def model_card(record: Mapping[str, Any], result: RunResult | None = None) -> str:
    """The README.md of an erasure, in Markdown with the front matter of the hub.

    Args:
        record: the content of erasure.json.
        result: what was measured, if it has been.
    """
    return (
        templates()
        .get_template("model_card.md.j2")
        .render(
            record=record,
            hub=hub_id(record),
            concepts=[c["name"] for c in record["concepts"]],
            files=[name for name in record["files"] if "/" not in name and name != "all.safetensors"],
            result=result,
            load=load_lines(record, "."),
            limits=NOT_PROMISED,
            remains=remains_line(record),
            removable=REMOVABLE if record.get("kind") == "guidance" else "",
            meaning=meaning,
            number=number,
            cell=_cell,
        )
    )


def remains_line(record: Mapping[str, Any]) -> str:
    """What an erasure leaves of its concepts and moves of the rest, in one line; `record` is the content of erasure.json."""
    if record.get("residual") is None:
        return "residual: not measured"
    return Remains(residual=record["residual"], drift=record["drift"]).line()


def _cell(text: str) -> str:
    """User text that cannot break out of a Markdown table or line."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
