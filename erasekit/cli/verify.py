"""`erasekit verify`: is an erasure whole, of this base, and what does it do to the weights?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from erasekit.cli import options
from erasekit.cli.ends import put, put_json
from erasekit.cli.progress import listener
from erasekit.cli.tables import show
from erasekit.events import StageStarted, heard
from erasekit.runs.config import settings_of
from erasekit.runs.resolve import DEFAULT_TASKS


def command(
    erasure: Annotated[Path, typer.Argument(help="The folder of an erasure.", show_default=False)],
    backbone: options.Backbone = None,
    task: options.Task = None,
    drift: Annotated[bool, typer.Option("--drift", help="Measure how far predictions drift too; minutes, or hours.")] = False,
    settings: options.Set = None,
    vram: options.Vram = None,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Check every file's hash and the base's, then print the certificate: what the weights do to the text, site by site."""
    from erasekit.erasures.certificate import certify
    from erasekit.erasures.erasure import Erasure
    from erasekit.erasures.manifest import read_manifest
    from erasekit.evaluation.finding import find_task

    chosen, registries = options.chosen(settings, vram), options.registries(plugin)
    kind = registries.backbones.get(backbone or read_manifest(erasure)["backbone"])
    wanted = find_task(task or DEFAULT_TASKS[kind.domain], kind.domain, registries)
    usual = wanted.protocol.model_dump() | dict(kind.sampling)
    protocol = settings_of(type(wanted.protocol), usual | chosen.get("protocol", {}), "protocol.")
    config = settings_of(kind.Config, chosen.get("backbone", {}), "backbone.")
    with listener() as told, heard(told):
        told(StageStarted("verify"))
        loaded = kind.load(config)
        saved = Erasure.load(erasure, loaded)
        content = certify(loaded, saved, wanted, protocol, drift=drift) if saved.kind == "weights" else {"kind": saved.kind}
    title = f"{', '.join(c.name for c in saved.concepts)}: every file is whole and belongs to '{saved.backbone}'"
    if as_json:
        put_json(content)
    elif saved.kind == "guidance":
        put(f"{title}; it changes no weights, so there is no certificate")
    else:
        _show(content, title)


def _show(content: dict[str, Any], title: str) -> None:
    from erasekit.erasures.certificate import MEANING

    rows = [
        [key, f"{content['max'][key]:.2e}", f"{content['mean'][key]:.2e}", text]
        for key, text in MEANING.items()
        if key in content["max"]
    ]
    show(["per site", "max", "mean", "relative to |W(e_w - e_u)|"], rows, title=title)
    if "prediction_drift" not in content:
        put("How far predictions drift was not measured: --drift does it.")
        return
    drift = [[f"{row['tau']:.3f}", f"{row['clean']:.2e}", f"{row['concept']:.2e}"] for row in content["prediction_drift"]]
    early = content["early_drift"]
    drift.append([f"< {early['tau0']}", f"{early['clean']:.2e}", f"{early['concept']:.2e}"])
    show(
        ["tau", "clean prompts", "concept"],
        drift,
        title="Prediction drift |f' - f| / |f| (Thm 3.3), and before tau0 (Cor. 3.4)",
    )
