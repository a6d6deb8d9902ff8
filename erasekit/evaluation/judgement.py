"""What a judge says of one image: the part of an evaluator's row that the tasks' metrics are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Judgement(BaseModel):
    """What a judge says of one image. An evaluator is a judge if its rows have `shown`.

    Attributes:
        seen: the labels that it sees.
        shown: whether the label that the prompt asked for is among them; None if the judge does not know that label.
        score: how sure it is of that label (a probability, a similarity), where it can say so.
        no_face: a face was asked for and there is none.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    seen: list[str] = []
    shown: bool | None
    score: float | None = None
    no_face: bool = False


FIELDS = tuple(Judgement.model_fields)


def judgement_in(found: Mapping[str, Any], prefix: str = "") -> Judgement | None:
    """The judgement in an evaluator's row, None if it is no judge's.

    Args:
        found: the row.
        prefix: stands before the names of the fields.

    Raises:
        ValueError: a field is of another type than it should be; says which.
    """
    if f"{prefix}shown" not in found:
        return None
    try:
        return Judgement(**{name: found[prefix + name] for name in FIELDS if prefix + name in found})
    except ValidationError as error:
        fault = error.errors()[0]
        wrong = f"{fault['msg'][0].lower()}{fault['msg'][1:]}, given {fault['input']!r}"
        raise ValueError(f"The field '{'.'.join(map(str, fault['loc']))}' of its row is wrong: {wrong}.") from None


def merged(given: Mapping[str, Judgement], order: Sequence[str]) -> dict[str, Any]:
    """The columns of one image that several judges have looked at.

    The plain columns, and `judge`, come from the first judge, in the task's order, that knows the label; if none does, from
    the first one. If there are several, each one's own stand beside them as `NAME.seen`, `NAME.shown`, `NAME.score`.

    Args:
        given: {judge: its judgement}.
        order: the task's evaluators.
    """
    names = [name for name in order if name in given]
    chosen = next((name for name in names if given[name].shown is not None), names[0])
    columns = {**given[chosen].model_dump(), "judge": chosen}
    if len(names) > 1:
        columns |= {f"{name}.{key}": value for name in names for key, value in given[name].model_dump().items()}
    return columns
