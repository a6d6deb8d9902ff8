"""Print the results of `bench.py` as a table, with a projection of what erasing takes at a method's default steps.

    python benchmarks/gpu/project.py gpu.json

A row that was cut took few sampling steps for its trajectories and images, and few training steps. How many rows the
denoiser predicts at all of them is counted on tiny models on a CPU, since it does not depend on the model's size:

    projection = measured + (rows at all steps - rows at few) * seconds per row + (steps - few) * seconds per step
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from metadata import write_metadata  # noqa: E402
from models import build as build_model  # noqa: E402
from row import STEPS, Passes, Row, planned  # noqa: E402

from erasekit.registration.plugins import default  # noqa: E402
from erasekit.runs.compute import compute  # noqa: E402
from erasekit.runs.plan import Plan  # noqa: E402


def full_steps(row: Row, base: Path) -> tuple[int, int]:
    """A row's sampling steps and training steps by default."""
    plan = planned(row._replace(whole=True), base, "cpu")
    return plan.protocol.steps, getattr(plan.method_config, "steps", 0)


def counted(row: Row, settings: dict[str, Any], base: Path, steps: int) -> int:
    """Rows that are predicted without gradients on a tiny model under the settings that were measured."""
    plan: Plan = planned(row._replace(vram="80"), base, "cpu", steps=steps, size=16)
    backbone = plan.backbone.load(plan.backbone_config)
    passes = Passes(backbone.predict)
    backbone.predict = passes
    measured = type(plan.method_config).model_validate(settings)
    compute(Plan(**{**vars(plan), "method_config": measured}), backbone, default())
    return passes.rows


def projected_s(row: Row, result: dict[str, Any], base: Path) -> float | None:
    """Seconds of erasing at the default number of steps; measured, where nothing was cut; None where a row failed."""
    if "failed" in result or row.few:
        return None
    seconds: float = result["stages"]["erase"]["s"]
    if row.whole:
        return seconds
    sampling, training = full_steps(row, base)
    if result["rows"]["n"]:
        more = counted(row, result["settings"], base, sampling) - counted(row, result["settings"], base, STEPS["protocol"])
        seconds += more * result["rows"]["s"] / result["rows"]["n"]
    return seconds + max(0, training - STEPS["method"]) * result.get("step_s", 0.0)


def peak_gb(result: dict[str, Any], which: str) -> float:
    """The highest of all stages."""
    return max((stage[which] for stage in result.get("stages", {}).values()), default=0.0)


def cells(name: str, result: dict[str, Any], projection: float | None) -> list[str]:
    """One row of the table."""
    stages, drawn = result.get("stages", {}), result.get("images")
    seconds = [f"{stages[stage]['s']:.1f}" if stage in stages else "" for stage in ("load", "encode", "erase")]
    speed = f"{stages['sample']['s'] / drawn['n']:.2f}" if drawn else ""
    predicted = result.get("predicted_gb") or {}
    return [
        f"`{name}`",
        *seconds,
        "failed" if projection is None else f"{projection:.0f}" if "-whole" not in name else "measured",
        str(result.get("step_s", "")),
        speed,
        f"{peak_gb(result, 'allocated_gb'):.1f}",
        f"{peak_gb(result, 'reserved_gb'):.1f}",
        f"{max(predicted.values()):.1f}" if predicted else "not predicted",
        str(result.get("limit_gb", "")),
        result.get("failed", ""),
    ]


def cells_cpu(name: str, result: dict[str, Any]) -> list[str]:
    """One row of the table of a CPU: wall seconds of stages, seconds of all its cores together, and the peak in RAM."""
    stages = result.get("stages", {})
    seconds = [f"{stages[stage]['s']:.0f}" if stage in stages else "" for stage in ("load", "encode", "erase", "save")]
    texts, rows = (f"{found['s']:.0f} ({found['n']})" if (found := result.get(key)) else "" for key in ("texts", "rows"))
    worked = sum(stage["cpu_s"] for stage in stages.values())
    peak = max((stage["resident_gb"] for stage in stages.values()), default=0.0)
    return [
        f"`{name}`",
        *seconds,
        texts,
        rows,
        f"{worked:.0f}",
        str(result.get("step_s", "")),
        f"{peak:.1f}",
        result.get("failed", ""),
    ]


HEAD_CPU = ["row", "load s", "encode s", "erase s", "save s", "of erase: texts s (n)", "rows without gradients s (n)"]
HEAD_CPU += ["CPU s of all stages", "s per step", "peak GB", "failed"]
HEAD = ["row", "load s", "encode s", "erase s", "erase s, projection", "s per step", "s per image"]
HEAD += ["peak GB", "reserved GB", "predicted GB", "limit GB", "failed"]


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("results", type=Path)
    results = json.loads(arguments.parse_args().results.read_text())
    if all(Row(**result["row"]).few for result in results["rows"].values()):
        lines = [HEAD_CPU, ["---"] * len(HEAD_CPU), *(cells_cpu(*row) for row in results["rows"].items())]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    with tempfile.TemporaryDirectory() as work:
        sys.path.insert(0, str(write_metadata(Path(work) / "metadata")))
        bases = {}
        for name, result in results["rows"].items():
            row = Row(**result["row"])
            if row.family not in bases:
                bases[row.family] = build_model(row.family, Path(work) / row.family, "cpu", tiny=True)
            print("| " + " | ".join(cells(name, result, projected_s(row, result, bases[row.family]))) + " |", flush=True)


if __name__ == "__main__":
    main()
