"""The card of an erasure: what was measured and how, how to load it, and what it does not promise."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from erasekit.backbones.where import shipped, where
from erasekit.erasures.remains import UNMEASURED, Remains
from erasekit.errors import ErasekitError
from erasekit.evaluation.results import RunResult, number
from erasekit.registration.plugins import default

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
REMOVABLE = (
    "No weight is changed: this erasure acts only while images are drawn by a pipeline that has loaded it. Whoever leaves it "
    "out has the base model, concept and all."
)
REVERSIBLE = "The file is an edit on top of the base: whoever takes it off has the base model again, concept and all."
NOT_PROMISED = (
    "The numbers hold for the prompts, seeds, sampler and evaluators that are named with them, and for no others.",
    "An erased concept is hard to reach, not impossible: optimised prompts, learned embeddings, image prompts or a little "
    "fine-tuning can bring it back.",
    REVERSIBLE,
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
        path = where(record["backbone"])
        return path if HUB_ID.fullmatch(path) else ""
    return ""


def load_lines(record: Mapping[str, Any], folder: str = "erasure", *, base: str = "", on_hub: bool = False) -> str:
    """The lines of Python that load an erasure and draw: in plain diffusers, unless it acts while images are drawn.

    Args:
        record: the content of erasure.json.
        folder: what to write for the folder that holds it.
        base: what to write for the base model: its folder or single file, if the reader has it there. Left out, as in files
            that travel: its id on the hub, or how a shipped one is found.
        on_hub: `folder` is a name on the hub.
    """
    imports, model = ["from diffusers import DiffusionPipeline"], _model(record, base)
    if model.startswith("where("):
        imports.append("from erasekit import where")
    place = json.dumps(folder, ensure_ascii=False)
    load = f'pipe.load_lora_weights({place}, weight_name="all.safetensors", adapter_name="erased")'
    if record.get("kind") == "guidance":
        imports, load = sorted([*imports, "from erasekit import load"]), f"load(pipe, {place})"
        if on_hub:
            imports, load = (
                [*imports, "from huggingface_hub import snapshot_download"],
                f"load(pipe, snapshot_download({place}))",
            )
    pipe = f"DiffusionPipeline.from_pretrained({model})"
    if base.endswith(".safetensors"):
        imports[0], pipe = "from diffusers import StableDiffusionPipeline", f"StableDiffusionPipeline.from_single_file({model})"
    words = "".join(f", {key}={value!r}" for key, value in _call(record["backbone"]).items())
    draw = f'image = pipe("a photo of a dog"{words}).images[0]'
    return "\n".join([*imports, "", f"pipe = {pipe}{_remark(record, base)}", load, draw, 'image.save("dog.png")', ""])


def _model(record: Mapping[str, Any], base: str) -> str:
    """The base model as Python: where the reader has it, else where the record says that it came from."""
    if not base and _is_shipped(record):
        return f"where({json.dumps(record['backbone'])})"
    return json.dumps(base or hub_id(record) or record["base"]["repo"], ensure_ascii=False)


def _remark(record: Mapping[str, Any], base: str) -> str:
    """What a reader has to know of the base in the snippet; nothing, where it runs as it stands."""
    made_on, hub = record["base"]["repo"], hub_id(record)
    if base or made_on == hub or _is_shipped(record):
        return ""
    return (
        f"  # made on the local {made_on!r}: load that, if it is another model" if hub else "  # the folder of the base model"
    )


def _is_shipped(record: Mapping[str, Any]) -> bool:
    """Whether an erasure was made on the model that its backbone brings along."""
    with suppress(ErasekitError):
        return shipped(record["backbone"]) and Path(where(record["backbone"])).name == record["base"]["repo"]
    return False


def _call(backbone: str) -> Mapping[str, Any]:
    """What a plain call of the backbone's pipeline has to be told."""
    with suppress(ErasekitError):
        return getattr(default().backbones.get(backbone), "call", {})
    return {}


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
            licence=licence(record),
            concepts=[c["name"] for c in record["concepts"]],
            files=[name for name in record["files"] if "/" not in name and name != "all.safetensors"],
            result=result,
            load=load_lines(record, "."),
            limits=NOT_PROMISED,
            remains=remains_line(record),
            removable=REMOVABLE if record.get("kind") == "guidance" else "",
            number=number,
            cell=_cell,
        )
    )


def merged_card(record: Mapping[str, Any]) -> str:
    """The README.md of a base model that has an erasure in its weights; `record` is the content of erasure.json."""
    return (
        templates()
        .get_template("merged_card.md.j2")
        .render(
            record=record,
            concepts=[c["name"] for c in record["concepts"]],
            licence=licence(record),
            call="".join(f", {key}={value!r}" for key, value in _call(record["backbone"]).items()),
            limits=[line for line in NOT_PROMISED if line is not REVERSIBLE],
            remains=remains_line(record),
            cell=_cell,
        )
    )


def licence(record: Mapping[str, Any]) -> dict[str, str]:
    """The licence of an erasure's base as the hub's front matter has it; {} for a model that erasekit does not know."""
    known = record["base"]["repo"] == hub_id(record) or _is_shipped(record)
    with suppress(ErasekitError):
        return dict(getattr(default().backbones.get(record["backbone"]), "licence", {})) if known else {}
    return {}


def remains_line(record: Mapping[str, Any]) -> str:
    """What an erasure leaves of its concepts and moves of the rest, in one line; `record` is the content of erasure.json."""
    if record.get("residual") is None:
        return UNMEASURED
    return Remains(residual=record["residual"], drift=record["drift"]).line()


def _cell(text: str) -> str:
    """User text that cannot break out of a Markdown table or line."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
