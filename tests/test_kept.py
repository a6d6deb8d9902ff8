"""One loaded model for several runs: the same bytes as with a fresh one for each."""

import pytest
import torch

from erasekit.backbones.memory import peak_memory_mb, reset_peak
from erasekit.erasures.loading import load_into, unload
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.kept import Kept
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from tests.conftest import THIRD_PARTY


@pytest.fixture(scope="module")
def registries(world):
    return plugins.load([world, THIRD_PARTY / "single_file_method.py"])


@pytest.fixture(scope="module", params=["tiny", "tiny-flux"])
def configured(request, tiny_folder, tiny_flux_folder):
    folder = tiny_folder if request.param == "tiny" else tiny_flux_folder

    def config(method, *overrides, concept="cat"):
        flags = {"method": method, "backbone": request.param, "task": "words", "concepts": (concept,)}
        return build(flags, overrides=[f"backbone.path={folder}", "backbone.device=cpu", *overrides])

    return config


def content(out, config, registries):
    path = path_of(out, resolve(config, registries))
    return {f.name: f.read_bytes() for f in (path / "images" / "erased").glob("*.png")}


def test_runs_with_one_model_give_what_each_gives_alone(registries, configured, tmp_path):
    """A LoRA, a steered pipeline, a closed form: what each leaves on the model must not reach the next."""
    kept, loaded = Kept(), set()
    for config in (configured("pull"), configured("sld"), configured("direction"), configured("pull", concept="dog")):
        together = run(config, out=tmp_path / "together", registries=registries, kept=kept)
        loaded.add(id(kept.load(resolve(config, registries)).denoiser))
        alone = run(config, out=tmp_path / "alone", registries=registries)
        assert together.metrics == alone.metrics
        assert together.erasure_sha256 == alone.erasure_sha256
        images = content(tmp_path / "together", config, registries)
        assert images == content(tmp_path / "alone", config, registries)
        assert len(images) == 5
    assert len(loaded) == 1


def test_another_model_takes_the_place_of_the_first(registries, configured):
    kept, plan = Kept(), resolve(configured("pull"), registries)
    first = kept.load(plan)
    assert kept.has(plan)
    other = resolve(configured("pull", "backbone.dtype=bfloat16"), registries)
    assert not kept.has(other)
    assert kept.load(other).dtype == torch.bfloat16
    assert kept.load(plan) is not first


def test_what_a_failed_run_leaves_on_the_model_is_gone_for_the_next(registries, configured, tmp_path):
    kept, config = Kept(), configured("pull", "method.nan_at=4")
    with pytest.raises(Exception, match="stopped at step"):
        run(config, out=tmp_path, registries=registries, kept=kept)
    plain = {
        k: v.clone()
        for k, v in resolve(config, registries)
        .backbone.load(resolve(config, registries).backbone_config)
        .denoiser.state_dict()
        .items()
    }
    after = kept.load(resolve(config, registries)).denoiser.state_dict()
    assert after.keys() == plain.keys()
    assert all(torch.equal(after[k], v) for k, v in plain.items())


@pytest.mark.parametrize("method", ["pull", "sld"])
def test_an_erasure_is_taken_out_again(registries, configured, tmp_path, method):
    config = configured(method)
    run(config, out=tmp_path, registries=registries)
    plan = resolve(config, registries)
    backbone = plan.backbone.load(plan.backbone_config)
    before = backbone.denoiser.state_dict().keys()
    call = backbone.call_arguments(backbone.encode(["a photo of a cat"]), empty=backbone.encode([""]), guidance=2.0)

    def draw(pipe):
        size, noise = {"height": 16, "width": 16}, torch.Generator().manual_seed(0)
        return pipe(**call, **size, num_inference_steps=2, generator=noise, output_type="latent").images

    pipe = backbone.pipeline(encoders=False, shared=True)
    plain = draw(pipe)
    load_into(pipe, path_of(tmp_path, plan) / "erasure", base=backbone, component=registries.components.get)
    assert not torch.equal(draw(pipe), plain)
    unload(pipe)
    assert torch.equal(draw(pipe), plain)
    assert backbone.unchanged()
    assert backbone.denoiser.state_dict().keys() == before
    assert not any(p.requires_grad for p in backbone.denoiser.parameters())


def test_a_peak_is_told_of_each_run_by_itself():
    reset_peak()
    low = peak_memory_mb()
    block = torch.ones(50 * 2**20)
    assert peak_memory_mb() > low + 150
    del block
    reset_peak()
    assert peak_memory_mb() < low + 100
