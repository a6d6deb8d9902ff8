"""`erasekit doctor`: is this machine ready?"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from erasekit.cli import options
from erasekit.cli.tables import show
from erasekit.errors import EnvironmentProblem


def command(plugin: options.Plugin = None, out: options.Out = Path("runs"), as_json: options.Json = False) -> None:
    """Check versions, device, disk and plugins; exit code 3 if no run could work."""
    from erasekit.doctor import diagnose

    checks = diagnose(options.registries(plugin), out)
    if as_json:
        typer.echo(json.dumps([c._asdict() for c in checks], indent=1))
    else:
        show(["check", "status", "detail"], [list(c) for c in checks])
    if problems := [c.name for c in checks if c.status == "problem"]:
        raise EnvironmentProblem(f"Not ready: {', '.join(problems)}. See the lines above.")
