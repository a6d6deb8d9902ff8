"""`erasekit verify`: is an erasure whole, of this base, and what does it do to the weights?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from erasekit.cli import options
from erasekit.cli.tables import show
from erasekit.config import DEFAULT_TASKS, parse_overrides, settings_of

MEANING = {
    "to_neutral": "|W'e_w - W e_u|, the concept read as the neutral word was (Thm 3.1)",
    "equal": "|W'e_w - W'e_u|, the concept read as the neutral word is (Prop. 3.2)",
    "neutral_drift": "|W'e_u - W e_u|, drift of the neutral word (Prop. 3.2)",
    "other_drift": "|W'e_o - W e_o|, drift of the tokens of clean prompts",
    "delta": "|Delta| / |W|",
}


def command(
    erasure: Annotated[Path, typer.Argument(help="The folder of an erasure.", show_default=False)],
    backbone: options.Backbone = None,
    task: options.Task = None,
    settings: options.Set = None,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Check every file's hash and the base's, then print the certificate: errors per site, and prediction drift per tau."""
    from erasekit.certificate import certify
    from erasekit.erasure import Erasure, read_manifest

    registries = options.registries(plugin)
    kind = registries.backbones.get(backbone or read_manifest(erasure)["backbone"])
    found = registries.tasks.get(task or DEFAULT_TASKS[kind.domain], kind.domain)
    config = settings_of(kind.Config, parse_overrides(settings or ()).get("backbone", {}), "backbone.")
    loaded = kind.load(config)
    saved = Erasure.load(erasure, loaded)
    title = f"{', '.join(c.name for c in saved.concepts)}: every file is whole and belongs to '{saved.backbone}'"
    if saved.kind == "guidance":
        said = f"{title}; it changes no weights, so there is no certificate"
        typer.echo(json.dumps({"kind": saved.kind}) if as_json else said)
        return
    wanted = found() if isinstance(found, type) else found
    protocol = wanted.protocol.model_copy(update=dict(kind.sampling))
    content = certify(loaded, saved, wanted, protocol)
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    else:
        _show(content, title)


def _show(content: dict[str, Any], title: str) -> None:
    rows = [[key, f"{content['max'][key]:.2e}", f"{content['mean'][key]:.2e}", text] for key, text in MEANING.items()]
    show(["per site", "max", "mean", "relative to |W(e_w - e_u)|"], rows, title=title)
    drift = [[f"{row['tau']:.3f}", f"{row['clean']:.2e}", f"{row['concept']:.2e}"] for row in content["prediction_drift"]]
    early = content["early_drift"]
    drift.append([f"< {early['tau0']}", f"{early['clean']:.2e}", f"{early['concept']:.2e}"])
    show(
        ["tau", "clean prompts", "concept"],
        drift,
        title="Prediction drift |f' - f| / |f| (Thm 3.3), and before tau0 (Cor. 3.4)",
    )
