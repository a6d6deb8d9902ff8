"""The adapters of the hub's models through `run` to the report, from folders in the hub's layout, by their own names."""

import json

import pytest

from erasekit.erasures.deltas import to_dense
from erasekit.erasures.loading import load_into
from erasekit.registration import plugins
from erasekit.runs.compute import compute
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from erasekit.testing import tiny, tiny_flux
from tests.conftest import THIRD_PARTY

TRACE = ("steps=2", "trajectories=2", "clean_trajectories=2", "batch=2", "rank=2")


SHORT = {"steps": 1, "trajectories": 2, "saliency_draws": 1, "images": 2, "kept_images": 2, "fusion_points": 4}
PRESETS = {m: plugins.default().methods.get(m).presets for m in ("esd", "uce", "rece", "mace", "ant", "eraseanything", "sld")}
CHOICES = [(m, name, "") for m in (*PRESETS, "negative-prompt") for name in ("sd15", "flux-dev")]
CHOICES += [(m, "sd15", preset) for m, presets in PRESETS.items() for preset in presets]
CHOICES += [(m, "flux-dev", "official") for m, presets in PRESETS.items() if "official" in presets]


@pytest.fixture(scope="module")
def registries():
    return plugins.load([THIRD_PARTY / "tiny_world.py", THIRD_PARTY / "natural_words.py"])


@pytest.mark.parametrize(
    ("name", "steps", "guidance"), [("sd15", 2, 2.0), ("sd14", 2, 2.0), ("flux-dev", 28, 3.5), ("flux-schnell", 4, 0.0)]
)
def test_a_folder_in_the_hubs_layout_runs_to_the_report(name, steps, guidance, registries, tmp_path):
    if name.startswith("sd"):
        folder = tiny.save_pipeline(tmp_path / "base", vae="kl")
    else:
        folder = tiny_flux.save_pipeline(tmp_path / "base", kind="schnell" if "schnell" in name else "dev")
    overrides = [f"backbone.path={folder}", "backbone.device=cpu", "backbone.dtype=float32", "protocol.size=16"]
    overrides += [f"method.{setting}" for setting in TRACE]
    config = build({"method": "trace", "backbone": name, "task": "words", "concepts": ("cat",)}, overrides=overrides)
    plan = resolve(config, registries)
    assert (plan.protocol.steps, plan.protocol.guidance) == (steps, guidance)
    result = run(config, out=tmp_path / "runs", registries=registries)
    path = path_of(tmp_path / "runs", plan)
    assert result.metrics["acc_e"].n == 1
    assert (path / "report.html").is_file()
    manifest = json.loads((path / "erasure" / "erasure.json").read_text())
    assert manifest["backbone"] == plan.config.backbone
    sites = {site.name for site in plan.backbone.load(plan.backbone_config).text_sites()}
    assert sites <= set(manifest["base"]["modules"])


@pytest.mark.parametrize(("method", "name", "preset"), CHOICES)
def test_every_method_erases_with_the_settings_of_real_models(method, name, preset, registries, tmp_path, request):
    folder = request.getfixturevalue("tiny_folder" if name == "sd15" else "tiny_flux_folder")
    kind = registries.methods.get(method)
    overrides = [f"backbone.path={folder}", "backbone.device=cpu", "backbone.dtype=float32", "protocol.size=16"]
    overrides += ["protocol.steps=8", *(f"method.{k}={v}" for k, v in SHORT.items() if k in kind.Config.model_fields)]
    flags = {"method": method, "backbone": name, "task": "words", "concepts": ("cat",), "preset": preset, "limit": 1}
    plan = resolve(build(flags, overrides=overrides), registries)
    backbone = plan.backbone.load(plan.backbone_config)
    erasure = compute(plan, backbone, registries)
    assert erasure.guidance or any(to_dense(delta).abs().max() > 0 for delta in erasure.total().values())
    erasure.save(tmp_path / "erasure")
    load_into(backbone.pipeline(), tmp_path / "erasure", base=backbone, component=registries.components.get)
