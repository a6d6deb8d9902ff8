"""What a run measured: the schema of results.json, tables, comparisons, and the rows behind the numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from erasekit.atomic import replacing
from erasekit.errors import UsageError
from erasekit.evaluation.notebook import shown

# The budget of the attacks decides these, and no other numbers.
ATTACKED = ("asr", "probe", "cost", "false_alarm", "chance")
ATTACKS_HASH = "attacks_hash"  # in a result's protocol, beside `hash`


class Metric(BaseModel):
    """One number of a run.

    Attributes:
        value: measured with the erasure; None if no image could be scored.
        base: the same of the unedited model, where it means something.
        ci95: a 95 % interval of `value`, where there is a sound one.
        n: how many images `value` rests on.
        higher_is_better: whether a larger value is the better one.
        evaluator: `name@version` of what scored them.
        meaning: in a few words, from where the metric is defined.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | None = Field(allow_inf_nan=False)
    base: float | None = Field(None, allow_inf_nan=False)
    ci95: tuple[float, float] | None = None
    n: int = Field(ge=0)
    higher_is_better: bool
    evaluator: str
    meaning: str = ""


class RunResult(BaseModel):
    """The content of results.json.

    Attributes:
        schema_version: of this file.
        method: the registered name of what erased.
        backbone: the registered name of the model.
        task: the task's name, without its domain.
        domain: of the task and the backbone: natural or mini.
        concepts: what was erased.
        seed: of everything random.
        config_hash: over all that decides the result; names the run's directory.
        protocol: how images were drawn and judged; only numbers of equal `hash` are comparable.
        counts: images of both sides: images, scored, failed, no_face.
        metrics: the numbers, by name.
        timings_s: seconds of each stage.
        peak_memory_mb: the most memory that the process held.
        erasure_sha256: over the files of the erasure.
        warnings: what a reader of the numbers has to know, one line each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    method: str
    backbone: str
    task: str
    domain: Literal["natural", "mini"]
    concepts: tuple[str, ...]
    seed: int
    config_hash: str
    protocol: dict[str, Any]
    counts: dict[str, int]
    metrics: dict[str, Metric]
    timings_s: dict[str, float]
    peak_memory_mb: float
    erasure_sha256: str
    warnings: tuple[str, ...] = ()
    _folder: Path | None = PrivateAttr(None)  # the run directory, for what a notebook shows

    def _repr_html_(self) -> str:
        """What a notebook shows: the numbers, and the run's images."""
        title = f"{', '.join(self.concepts)}, erased from {self.backbone} by {self.method} ({self.task})"
        rows = [
            [name, number(m.value), number(m.base), " to ".join(map(number, m.ci95)) if m.ci95 else "", str(m.n), m.meaning]
            for name, m in self.metrics.items()
        ]
        return shown(title, ["metric", "value", "base", "95 %", "n", "what it is"], rows, self._folder, self.warnings)

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they lie."""
        return isinstance(other, RunResult) and self.__dict__ == other.__dict__

    @field_validator("protocol")
    @classmethod
    def _has_hash(cls, protocol: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(protocol.get("hash"), str):
            raise ValueError("a protocol needs its 'hash'")
        return protocol


class Table(NamedTuple):
    """Plain text cells; how they are drawn is the command line's business."""

    columns: list[str]
    rows: list[list[str]]


def write_result(result: RunResult, path: Path) -> None:
    """Write results.json, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    result._folder = path.parent


def read_result(path: Path) -> RunResult:
    """Read results.json.

    Raises:
        UsageError: there is none, or it is not one.
    """
    try:
        result = RunResult.model_validate_json(path.read_text(encoding="utf-8"))
        result._folder = path.parent
        return result
    except OSError as error:
        raise UsageError(f"Cannot read results '{path}': {error.strerror}. Give the folder of a finished run.") from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "not text"
        raise UsageError(f"'{path}' is not a results.json of this version: {first}. Run 'erasekit evaluate' again.") from error


def mean_over_concepts(results: Sequence[RunResult]) -> RunResult:
    """The mean over runs that each erased one concept.

    Intervals are of the mean of independent estimates, from their own intervals (MOVER, Zou and Donner 2008, Eq. 3 for k
    terms): lower = mean - sqrt(sum (v_i - l_i)^2) / k, and likewise upper.

    Raises:
        UsageError: the runs differ in more than their concepts.
    """
    if not results:
        raise UsageError("There is nothing to take the mean of: no run was given.")
    first = results[0]
    same = ("method", "backbone", "task", "domain", "seed")
    differing = [k for k in same if len({getattr(r, k) for r in results}) > 1]
    settings = [{k: v for k, v in r.protocol.items() if k not in ("hash", ATTACKS_HASH)} for r in results]
    hashes = {k: _joined([r.protocol[k] for r in results])[:8] for k in ("hash", ATTACKS_HASH) if k in first.protocol}
    if any(s != settings[0] for s in settings):
        differing.append("protocol")
    if differing:
        raise UsageError(f"Runs that differ in {', '.join(differing)} have no common mean. Give runs of different concepts.")
    names = [name for name in first.metrics if all(name in r.metrics for r in results)]
    return RunResult(
        **{k: getattr(first, k) for k in same},
        concepts=tuple(c for r in results for c in r.concepts),
        config_hash=_joined([r.config_hash for r in results])[:8],
        protocol=settings[0] | hashes,
        counts=_sums([r.counts for r in results]),
        metrics={name: _mean_metric([r.metrics[name] for r in results]) for name in names},
        timings_s=_sums([r.timings_s for r in results]),
        peak_memory_mb=max(r.peak_memory_mb for r in results),
        erasure_sha256=_joined([r.erasure_sha256 for r in results]),
    )


def _joined(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _sums(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(k for part in parts for k in part)
    return {k: sum(part[k] for part in parts if k in part) for k in keys}


def _mean_metric(metrics: Sequence[Metric]) -> Metric:
    k = len(metrics)
    values = [m.value for m in metrics if m.value is not None]
    bases = [m.base for m in metrics if m.base is not None]
    value = sum(values) / k if len(values) == k else None
    interval = None
    if value is not None and all(m.ci95 for m in metrics):
        below = math.sqrt(sum((v - m.ci95[0]) ** 2 for v, m in zip(values, metrics, strict=True) if m.ci95)) / k
        above = math.sqrt(sum((m.ci95[1] - v) ** 2 for v, m in zip(values, metrics, strict=True) if m.ci95)) / k
        interval = (value - below, value + above)
    return Metric(
        value=value,
        base=sum(bases) / k if len(bases) == k else None,
        ci95=interval,
        n=sum(m.n for m in metrics),
        higher_is_better=metrics[0].higher_is_better,
        evaluator=metrics[0].evaluator,
    )


def number(value: float | None) -> str:
    """A number as tables show it: shares to a thousandth, scores and distances that are large to a tenth."""
    return "-" if value is None else f"{value:z.{3 if abs(value) < 10 else 1}f}"


def table(result: RunResult) -> Table:
    """One row per metric, with the base's value beside it."""
    rows = []
    for name, m in result.metrics.items():
        interval = " to ".join(map(number, m.ci95)) if m.ci95 else "-"
        better = "higher" if m.higher_is_better else "lower"
        rows.append([name, number(m.value), number(m.base), interval, str(m.n), better, m.evaluator])
    return Table(["metric", "value", "base", "95 % interval", "n", "better", "evaluator"], rows)


def compare(results: Sequence[RunResult]) -> Table:
    """One row per run. Numbers of different protocols never share a column: each hash gets columns of its own."""
    keys = list(dict.fromkeys((name, hash_of(r, name)) for r in results for name in r.metrics))
    kinds = [{h for name, h in keys if _attacked(name) is which} for which in (False, True)]
    several = any(len(hashes) > 1 for hashes in kinds)
    columns = ["method", "backbone", "task", "concepts", "seed"]
    columns += [f"{name} [{h}]" if several else name for name, h in keys]
    rows = []
    for r in results:
        cells = [number(r.metrics[n].value) if n in r.metrics and hash_of(r, n) == h else "" for n, h in keys]
        rows.append([r.method, r.backbone, r.task, ", ".join(r.concepts), str(r.seed), *cells])
    return Table(columns, rows)


def hash_of(result: RunResult, metric: str) -> str:
    """The hash of all that decides a metric besides the model: the protocol's, of an attack that of its budget too."""
    return str(result.protocol.get(ATTACKS_HASH, "") if _attacked(metric) else result.protocol["hash"])


def _attacked(metric: str) -> bool:
    return metric.partition("[")[0] in ATTACKED


def write_scores(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write scores.parquet: one row per image with its prompt, seed, set, concept, side, file and scores."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = list(dict.fromkeys(k for row in rows for k in row))
    with replacing(path) as temporary:
        parquet.write_table(pa.table({c: [row.get(c) for row in rows] for c in columns}), temporary)


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Read scores.parquet.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"Cannot read scores '{path}'. Run 'erasekit evaluate' again.") from error
    return rows
