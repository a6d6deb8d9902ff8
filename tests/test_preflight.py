"""What a plan is predicted to take, and what is said before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasekit.backbones.flux import Flux, FluxConfig
from erasekit.backbones.memory import VRAM_GB, Footprint, budget_gb, check_disk, predict
from erasekit.backbones.sd import StableDiffusion, StableDiffusionConfig
from erasekit.errors import EnvironmentProblem
from erasekit.registration import plugins
from erasekit.runs import estimate, preflight
from erasekit.runs.config import build
from erasekit.runs.ready import ready
from erasekit.runs.resolve import resolve
from erasekit.testing import tiny, tiny_flux

REGISTRIES = plugins.default()
CPU = {"device": "cpu"}


@pytest.fixture(autouse=True)
def _room(monkeypatch):
    """A disk with room for every download, whatever machine the tests run on."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 0, 2**40))


def planned(method, backbone, *settings, **flags):
    wanted = build({"method": method, "backbone": backbone, "concepts": ("a dog",), **flags}, overrides=settings)
    return resolve(wanted, REGISTRIES)


@pytest.fixture(scope="module")
def table():
    return estimate.table(REGISTRIES)


def test_the_table_has_every_method_on_every_size_of_gpu(table):
    methods = {entry.name for entry in REGISTRIES.methods.entries()}
    large = ("sdxl", "sd35-medium", "sd35-large", "flux", "flux2-klein-base-4b", "flux2-klein-base-9b")
    models = {(name, 1024) for name in large} | {("sd15", 512), ("flux", 512)}
    found = {(row["method"], row["backbone"], row["size"], row["vram"]) for row in table}
    assert found == {(m, *model, gb) for m in methods for model in models for gb in VRAM_GB}


def test_what_methods_draw_before_they_train_is_counted():
    fields = {name for entry in REGISTRIES.methods.entries() for name in entry.load().Config.model_fields}
    pools = {name for name in fields if name.endswith(("trajectories", "images"))} - {"debias_images"}
    assert pools == set(preflight.POOLS)


def test_defaults_are_predicted_to_lie_under_every_preset_or_are_refused(table):
    """At 512 pixels only small GPUs are refused, and for training alone: whole weights, attention maps, five or six rows of a
    step (SPM, AdvUnlearn), or 8 GB for FLUX.

    SDXL, at 1024 pixels, needs 12 GB for anything; SD3.5 and FLUX.2 draw at 8 GB, their text encoders on the CPU.
    """
    for row in table:
        if row["fits"]:
            assert row["predicted_gb"] <= budget_gb(row["vram"]) + 0.05  # shown to a tenth
        if row["vram"] >= 48 and row["size"] == 512:
            assert row["fits"], row
        if not row["batch"]:
            assert row["fits"] or (row["backbone"], row["vram"]) == ("sdxl", 8), row
    refused = {(r["method"], r["backbone"], r["vram"]) for r in table if not r["fits"] and r["size"] == 512}
    assert {method for method, backbone, gb in refused if gb > 8} <= {"advunlearn", "eraseanything", "mace", "spm"}
    assert {method for method, backbone, gb in refused if backbone == "sd15"} == {
        "ant",
        "stereo",
    }  # they train nearly all weights
    assert all(backbone == "flux" or gb <= 8 for _, backbone, gb in refused)


def test_what_is_trained_is_counted_by_what_the_concept_is():
    """ESD trains cross-attention alone, or all but it; AdvUnlearn what its scope names."""
    style, thing = (
        preflight.footprint(planned("esd", "sd15", "backbone.device=cpu", kind=kind)).trained_gb for kind in ("style", "object")
    )
    everything = sum(StableDiffusion.linears(StableDiffusionConfig(**CPU)).values()) * 18 / 2**30
    assert 0.1 * everything < style < 0.25 * everything
    assert style + thing == pytest.approx(everything)
    keys, every = (
        preflight.footprint(planned("advunlearn", "sd15", "backbone.device=cpu", f"method.scope={scope}")).trained_gb
        for scope in ("kv", "all")
    )
    assert every == pytest.approx(everything)
    assert keys == pytest.approx(18 * 19_169_280 / 2**30)


@pytest.mark.parametrize(("method", "gb"), [("eraseanything", 12), ("trace", 8), ("ant", 8)])
def test_what_is_predicted_not_to_fit_is_refused(table, method, gb):
    row = next(r for r in table if (r["method"], r["backbone"], r["size"], r["vram"]) == (method, "flux", 512, gb))
    assert not row["fits"]
    with pytest.raises(EnvironmentProblem) as error:
        preflight.preflight(planned(method, "flux", f"backbone.vram={gb}", "backbone.device=cpu"))
    assert "\n" not in str(error.value)


def test_a_batch_is_cut_so_that_the_gradient_stays():
    whole = planned("esd", "flux", "method.batch=8", "protocol.size=1024", "backbone.device=cpu")
    cut = planned("esd", "flux", "method.batch=8", "protocol.size=1024", "backbone.vram=24", "backbone.device=cpu")
    assert whole.method_config.batch == 8, "no size of GPU is planned for on a CPU"
    assert cut.method_config.batch < 8
    assert cut.method_config.batch * cut.method_config.accumulate == 8
    assert preflight.prediction(cut).peak <= budget_gb(24)


def test_the_prediction_is_the_sum_of_its_parts():
    needs = Flux.needs(FluxConfig(vram="48", **CPU), 512)
    row = needs.activations
    found = predict(needs, Footprint(rows=3, maps=True, trained_gb=2.0), images=4, passes=1)
    held = needs.denoiser + needs.vae + 1.3
    assert found.train == pytest.approx(held + 2.0 + 3 * (row.checkpointed + row.maps))
    assert found.draw == pytest.approx(held + max(4 * row.forward, 4 * row.decode))
    assert found.encode == pytest.approx(needs.encoders + 0.5 + 1.3)
    assert found.peak == max(found)
    in_fp32 = Flux.needs(FluxConfig(vram="48", dtype="float32", **CPU), 512)
    assert in_fp32.denoiser == pytest.approx(2 * needs.denoiser)


@pytest.mark.parametrize(
    ("backbone", "config", "gb"),
    [
        (Flux, FluxConfig(dtype="bfloat16", vram="80", **CPU), 22.2),  # encoders are gone when the transformer comes
        (StableDiffusion, StableDiffusionConfig(**CPU), 3.97),
        (StableDiffusion, StableDiffusionConfig(dtype="bfloat16", **CPU), 1.99),
    ],
)
def test_the_weights_of_the_real_models(backbone, config, gb):
    assert backbone.weights_gb(config) == pytest.approx(gb, rel=0.02)


def test_the_weights_of_a_folder_are_counted_in_the_type_they_are_held_in(tiny_folder, tmp_path):
    elements = sum(p.numel() for f in ("unet", "text_encoder", "vae") for p in _tensors(tiny_folder / f).values())
    half = _halved(tiny_folder, tmp_path / "half")
    for folder in (tiny_folder, half):
        for dtype, width in (("float32", 4), ("bfloat16", 2)):
            config = StableDiffusionConfig(path=str(folder), dtype=dtype, device="cpu")
            assert tiny.TinySD.weights_gb(config) == pytest.approx(width * elements / 2**30)


def _tensors(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def _halved(folder, target):
    """The same pipeline with nothing but fp16 files, as some folders are."""
    shutil.copytree(folder, target)
    for file in target.glob("*/*.safetensors"):
        save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, file, {"format": "pt"})
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    return target


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_folder_of_fp16_files_loads(kind, tiny_folder, tiny_flux_folder, tmp_path):
    module, folder = (tiny, tiny_folder) if kind == "sd" else (tiny_flux, tiny_flux_folder)
    whole, half = module.load(folder), module.load(_halved(folder, tmp_path / "half"))
    cond, x, tau = whole.encode(["a cat"]), whole.latents([0]), torch.tensor([0.5])
    with torch.no_grad():
        predicted = [b.predict(x, tau, cond) for b in (whole, half)]
    torch.testing.assert_close(*predicted, rtol=0.05, atol=0.02)
    assert half.pipeline().vae is not None
    assert len(half.fingerprint([site.name for site in half.text_sites()])) == 64


def test_four_bits_without_bitsandbytes_are_noticed_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plan = planned("trace", "flux", "backbone.vram=24", "backbone.device=cpu")
    with pytest.raises(EnvironmentProblem, match=r"--vram 24 needs bitsandbytes: pip install 'erasekit\[nf4\]'"):
        preflight.preflight(plan)


@pytest.fixture
def installed(monkeypatch):
    """As if bitsandbytes were there."""
    monkeypatch.setattr("erasekit.backbones.held.importlib.util.find_spec", lambda name: object())


def test_flux_is_not_trained_layer_by_layer(installed):
    with pytest.raises(EnvironmentProblem, match=r"'flux' cannot be trained with --vram 8: .* e.g. uce"):
        preflight.preflight(planned("trace", "flux", "backbone.vram=8", "backbone.device=cpu"))
    preflight.preflight(planned("uce", "flux", "backbone.vram=8", "backbone.device=cpu"))


def test_too_small_a_gpu_names_the_next_larger_one(installed):
    plan = planned("eraseanything", "flux", "backbone.vram=12", "backbone.device=cpu")
    with pytest.raises(EnvironmentProblem, match=r"is predicted to take \d+ GB, more than --vram 12 allows. Use --vram 24"):
        preflight.preflight(plan)


def test_too_little_memory_is_said(monkeypatch):
    monkeypatch.setattr(preflight, "there_gb", lambda device: 4.0)
    with pytest.raises(EnvironmentProblem, match="4 GB is free in this machine's memory"):
        preflight.preflight(planned("esd", "sd15", "backbone.device=cpu"))


def test_a_closed_form_on_a_cpu_needs_room_for_the_text_encoders_alone(monkeypatch):
    monkeypatch.setattr(preflight, "there_gb", lambda device: 14.0)
    for method in ("uce", "speed", "rece"):
        preflight.preflight(planned(method, "flux", "backbone.device=cpu"))
    for plan, images in (
        (planned("uce", "flux", "backbone.device=cpu"), 2),
        (planned("esd", "flux", "backbone.device=cpu"), 0),
    ):
        with pytest.raises(EnvironmentProblem, match="14 GB is free"):
            preflight.preflight(plan, images=images)


def test_days_on_a_cpu_are_refused_unless_a_cpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(preflight, "there_gb", lambda device: 1000.0)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    plan = planned("esd", "flux", "method.steps=1000", "method.batch=8")
    rows = 3 * 1000 * 8 + 24 * 28 * 3 + 2000  # its training, its trajectories, what says what it leaves
    hours = rows * 2 * 11.9e-3 * 1536 / preflight.CORE_TFLOPS / 3600
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert preflight.cpu_hours(plan, 0)[0] == pytest.approx(hours / 4)
    with pytest.raises(EnvironmentProblem, match=rf"would take about {hours / 4 / 24:.0f} days to erase. Use a GPU"):
        preflight.preflight(plan)
    preflight.preflight(planned("esd", "flux", "method.steps=1000", "method.batch=8", "backbone.device=cpu"))


def test_days_of_drawing_on_a_cpu_are_refused_too(monkeypatch):
    """A closed form is solved in seconds anywhere; the images that measure it are not drawn in seconds."""
    monkeypatch.setattr(preflight, "there_gb", lambda device: 1000.0)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    plan = planned("uce", "sd15")
    days = 1740 * 50 * 2 * 0.8 / (2 * preflight.CORE_TFLOPS) / 3600 / 24
    assert preflight.cpu_hours(plan, 1740) == (0, pytest.approx(24 * days))
    with pytest.raises(
        EnvironmentProblem, match=rf"about 0 hours to erase, {days:.0f} days to draw 1740 images\. Use .*--limit"
    ):
        preflight.preflight(plan, images=1740)
    preflight.preflight(plan, images=8)
    preflight.preflight(planned("uce", "sd15", "backbone.device=cpu"), images=1740)


def test_a_download_that_has_no_room_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40, 2**30))
    with pytest.raises(EnvironmentProblem, match=r"'black-forest-labs/FLUX.1-dev' is about 31 GB; .* has 1 GB free"):
        preflight.preflight(planned("uce", "flux", "backbone.vram=80", "backbone.device=cpu"))


def test_a_disk_without_room_is_said_before_anything_is_loaded(monkeypatch, tmp_path):
    """100 MB to spare for an erasure; for a run (tests/test_cost.py has its parts) more."""
    usage, free = namedtuple("usage", "total used free"), [0.0]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40, free[0]))
    for free[0] in (100e6, 2**40):
        check_disk(tmp_path / "not" / "there")
    free[0] = 100e6 - 1
    with pytest.raises(EnvironmentProblem, match=r"needs about 100 MB in '.*there', which has 100 MB free\. Free some"):
        check_disk(tmp_path / "not" / "there")
    plan, free[0] = planned("uce", "sd15-mini", concepts=("dog",)), 0.0
    with pytest.raises(EnvironmentProblem, match="The run needs up to"):
        ready(plan, [], tmp_path, REGISTRIES)
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_images_is_one_setting_that_ls_states():
    for entry in REGISTRIES.backbones.entries():
        if entry.load().domain == "natural":
            size = planned("uce", entry.name).protocol.size
            assert f"{size} x {size}" in entry.summary
    assert Flux.sampling["size"] == Flux.size


def test_the_commands_show_the_prediction(erasekit):
    shown = json.loads(erasekit("doctor", "--plan", "--json").stdout)
    row = next(r for r in shown if (r["method"], r["backbone"], r["size"], r["vram"]) == ("trace", "flux", 512, 48))
    assert row["checkpointing"]
    assert row["weights"] == "whole"
    dry = ("--method", "trace", "--backbone", "flux", "-c", "a dog", "--vram", "48", "-s", "backbone.device=cpu", "--dry-run")
    plan = json.loads(erasekit("run", *dry, "--json").stdout)
    assert f"predicted peak {row['predicted_gb']:.1f} GB" in plan["stages"]["memory"]
    told = erasekit(
        "erase", "--method", "trace", "--backbone", "flux", "-c", "a dog", "--vram", "8", "-s", "backbone.device=cpu"
    )
    assert told.returncode == 3
    assert "cannot be trained with --vram 8" in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1
