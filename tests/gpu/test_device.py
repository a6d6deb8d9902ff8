"""Whole runs, every method and every preset of memory on a GPU; `--device cpu` runs the same without one."""

from importlib.util import find_spec

import pytest
import torch

from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into
from erasekit.runs.compute import compute
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.runs.runner import run
from erasekit.testing.tiny_flux import TinyFlux
from erasekit.testing.worlds import with_world
from tests.contracts.test_methods import FILE, METHODS, SHORT

REGISTRIES = with_world(FILE)


@pytest.fixture(params=["tiny", "tiny-flux"])
def base(request, tiny_folder, tiny_flux_folder):
    """(backbone name, folder)."""
    return request.param, {"tiny": tiny_folder, "tiny-flux": tiny_flux_folder}[request.param]


def planned(method, base, device, *overrides, vram="141"):
    """A plan; a preset of memory is named so that a CPU holds the model as a GPU does."""
    backbone, folder = base
    flags = {"method": method, "backbone": backbone, "task": "words", "concepts": ("cat",)}
    place = [f"backbone.path={folder}", f"backbone.device={device}", f"backbone.vram={vram}"]
    options = {"method": SHORT.get(method, {})}
    return build(flags | {"options": options}, overrides=[*place, *overrides])


def drawn(backbone, pipe, plan):
    """Latents of one prompt."""
    call = backbone.call_arguments(backbone.encode(["a photo of a cat"]), empty=backbone.encode([""]), guidance=2.0)
    size = dict.fromkeys(("height", "width"), plan.protocol.size)
    seed = torch.Generator().manual_seed(0)
    return pipe(**call, **size, num_inference_steps=2, generator=seed, output_type="latent").images


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_scores_every_image(base, device, tmp_path, dtype):
    result = run(planned("pull", base, device, f"backbone.dtype={dtype}"), out=tmp_path, registries=REGISTRIES)
    assert result.counts["failed"] == 0
    assert result.peak_memory_mb > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_erases_in_bfloat16(base, device, tmp_path, method):
    plan = resolve(planned(method, base, device, "backbone.dtype=bfloat16"), REGISTRIES)
    used, backbone = (plan.backbone.load(plan.backbone_config) for _ in range(2))
    compute(plan, used, REGISTRIES).save(tmp_path / "erasure")
    backbone.encode(["a photo of a cat", ""])
    before, after = backbone.denoiser.state_dict(), used.denoiser.state_dict()
    assert before.keys() == after.keys(), "the method left adapters on the base"
    assert all(torch.equal(before[k], after[k]) for k in before), "the method changed the base"
    assert Erasure.load(tmp_path / "erasure", backbone).method == method
    plain, pipe = backbone.pipeline(encoders=False), backbone.pipeline(encoders=False)
    load_into(pipe, tmp_path / "erasure", base=backbone, component=REGISTRIES.components.get)
    erased = drawn(backbone, pipe, plan)
    assert torch.isfinite(erased).all()
    assert erased.device.type == device
    assert not torch.equal(erased, drawn(backbone, plain, plan)), "the erasure changes nothing"


@pytest.mark.parametrize("method", ["pull", "trace", "esd", "mace", "eraseanything", "ant"])
@pytest.mark.parametrize("vram", sorted(gb for gb, held in TinyFlux.holding.items() if held.weights != "offload"))
def test_every_method_trains_under_every_preset_of_memory(tiny_flux_folder, device, tmp_path, vram, method):
    if TinyFlux.holding[vram].weights == "nf4" and (device == "cpu" or not find_spec("bitsandbytes")):
        pytest.skip("four bits need a GPU and bitsandbytes")
    planned_for = planned(method, ("tiny-flux", tiny_flux_folder), device, "backbone.dtype=bfloat16", vram=vram)
    plan = resolve(planned_for, REGISTRIES)
    backbone = plan.backbone.load(plan.backbone_config)
    steps = []
    compute(plan, backbone, REGISTRIES, log=lambda step, total, values: steps.append(step)).save(tmp_path / "erasure")
    assert len(steps) == plan.method_config.steps
