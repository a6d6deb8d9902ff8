"""`erasekit doctor`: is this machine ready?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import options
from erasekit.cli.ends import put_json
from erasekit.cli.tables import show
from erasekit.errors import EnvironmentProblem


def command(
    plan: Annotated[
        bool, typer.Option("--plan", help="Predict the memory of every method on the real models instead; nothing is loaded.")
    ] = False,
    plugin: options.Plugin = None,
    out: options.Out = Path("runs"),
    as_json: options.Json = False,
) -> None:
    """Check versions, device, disk and plugins; exit code 3 if no run could work."""
    if plan:
        _show_plan(plugin, as_json=as_json)
        return
    from erasekit.runs.doctor import diagnose

    checks = diagnose(options.registries(plugin), out)
    if as_json:
        put_json([c._asdict() for c in checks])
    else:
        show(["check", "status", "detail"], [list(c) for c in checks])
    if problems := [c.name for c in checks if c.status == "problem"]:
        raise EnvironmentProblem(f"Not ready: {', '.join(problems)}. See the lines above.")


def _show_plan(plugin: options.Plugin, *, as_json: bool) -> None:
    """Print the predicted peak of every method on every size of GPU."""
    from erasekit.backbones.memory import VRAM_GB
    from erasekit.runs.estimate import table

    found = table(options.registries(plugin))
    if as_json:
        put_json(found)
        return
    lines: dict[tuple[str, str], list[str]] = {}
    for row in found:
        cell = f"{row['predicted_gb']:.1f}" if row["fits"] else f"({row['predicted_gb']:.1f})"
        batch = f" [{row['batch']}]" if row["batch"] else ""
        lines.setdefault((row["method"], f"{row['backbone']} {row['size']}"), []).append(cell + batch)
    title = "Predicted peak in GB by size of GPU, [batch x accumulate]; (what would not go in)"
    show(["method", "model", *(f"{gb} GB" for gb in VRAM_GB)], [[*key, *cells] for key, cells in lines.items()], title=title)
