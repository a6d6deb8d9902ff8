"""What every method owes on every backbone: a file that loads, a base that stays as it was, a concept that moves."""

import pytest
import torch

from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into
from erasekit.registration import plugins
from erasekit.runs.compute import compute
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from tests.conftest import THIRD_PARTY

SHORT = {
    "trace": ["method.eta=1.0", "method.steps=2", "method.trajectories=4", "method.clean_trajectories=4", "method.batch=2"],
    "ant": ["method.steps=2", "method.trajectories=2", "method.batch=2", "method.saliency_draws=1", "method.fusion_points=8"],
    "eraseanything": ["method.steps=2", "method.images=2", "method.kept_images=3"],
    "esd": ["method.steps=2", "method.trajectories=2", "method.batch=2"],
    "mace": ["method.steps=2", "method.images=2", "method.kept_images=3"],
    "pull": ["method.steps=2"],
}
REGISTRIES = plugins.load([THIRD_PARTY / "tiny_world.py", THIRD_PARTY / "single_file_method.py"])
METHODS = [entry.name for entry in REGISTRIES.methods.entries()]


def pytest_generate_tests(metafunc):
    minis = ["sd15-mini", "flux-mini"] if metafunc.config.getoption("--full") else []
    if "base" in metafunc.fixturenames:
        metafunc.parametrize("base", ["tiny", "tiny-flux", *minis], indirect=True, scope="module")


@pytest.fixture(scope="module")
def base(request, tiny_folder, tiny_flux_folder):
    """(backbone name, task, overrides, the loaded backbone)."""
    backbone = request.param
    folder = {"tiny": tiny_folder, "tiny-flux": tiny_flux_folder}.get(backbone)
    task = "words" if folder else "objects"
    overrides = ["backbone.device=cpu", "backbone.dtype=float32", *([f"backbone.path={folder}"] if folder else [])]
    plan = resolve(build({"method": "pull", "backbone": backbone, "task": task}, overrides=overrides), REGISTRIES)
    return backbone, task, overrides, plan.backbone.load(plan.backbone_config)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_its_contract(base, method, tmp_path):
    backbone, task, overrides, loaded = base
    flags = {"method": method, "backbone": backbone, "task": task, "concepts": ("cat",)}
    plan = resolve(build(flags, overrides=[*overrides, *SHORT.get(method, [])]), REGISTRIES)
    before = {k: v.clone() for k, v in loaded.denoiser.state_dict().items()}
    hashes = [compute(plan, loaded, REGISTRIES).save(tmp_path / str(i)) for i in range(2)]

    after = loaded.denoiser.state_dict()
    assert before.keys() == after.keys(), "the method left adapters on the base"
    assert all(torch.equal(before[k], after[k]) for k in before), "the method changed the base"
    assert not any(p.requires_grad for p in loaded.denoiser.parameters()), "the method left gradients on"
    assert hashes[0] == hashes[1], "the same settings and seed gave another file"

    erasure = Erasure.load(tmp_path / "0", loaded)
    assert erasure.method == method
    assert erasure.config == plan.method_config.model_dump(mode="json")
    pipe = loaded.pipeline()
    load_into(pipe, tmp_path / "0", base=loaded, component=REGISTRIES.components.get)
    call = loaded.call_arguments(loaded.encode(["a photo of a cat"]), empty=loaded.encode([""]), guidance=2.0)
    size = dict.fromkeys(("height", "width"), plan.protocol.size)
    plain, erased = (
        p(**call, **size, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for p in (loaded.pipeline(), pipe)
    )
    assert not torch.allclose(plain, erased, rtol=0, atol=1e-7), "the erasure changes nothing"
    assert torch.isfinite(erased).all()
