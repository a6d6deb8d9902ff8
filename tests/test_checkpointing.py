"""Every method that trains gives the same erasure whether activations are kept or recomputed, as `--vram` decides."""

from __future__ import annotations

import pytest
import torch

from erasekit.backbones.attention import attention_maps
from erasekit.erasures.deltas import to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.methods.context import RunContext
from erasekit.methods.exchange import Exchanged
from erasekit.registration import plugins
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.runner import run
from erasekit.testing import tiny, tiny_flux, tiny_flux2
from tests.third_party.tiny_world import Words

SMALL = [("tiny", "8"), ("tiny-flux", "48"), ("tiny-flux", "8")]  # GPUs on which a family recomputes
COMMON = {"steps": 3, "batch": 2, "warmup": 0, "lr": 1e-3}
POOL = {"trajectories": 3}
METHODS = {
    "esd-full": ("esd", POOL | {"weights": "full", "variant": "all"}),
    "esd-lora": ("esd", POOL | {"weights": "lora", "variant": "x"}),
    "ant-single": ("ant", POOL | {"form": "single", "tau0": 0.3, "saliency_draws": 1}),
    "ant-multi": ("ant", POOL | {"form": "multi", "tau0": 0.3, "rank": 2, "fusion_points": 6}),
    "mace": ("mace", {"images": 2, "kept_images": 2}),
    "eraseanything": ("eraseanything", {"images": 2, "kept_images": 5, "rank": 2}),
    "spm": ("spm", {"anchors": 1}),
    "eraseflow": ("eraseflow", {"rank": 2}),  # which recomputes whole predictions, and these their blocks
    "trace": ("trace", POOL | {"clean_trajectories": 3, "eta": 1.0, "rank": 2, "near_words": 0, "tau0": 0.3}),
}


def erased(world, folder, out, *, backbone, vram, method, settings):
    """The deltas of a run from its configuration on, on a GPU that is said to be of size `vram`."""
    overrides = [f"backbone.path={folder}", "backbone.device=cpu", "backbone.dtype=float32", f"backbone.vram={vram}"]
    overrides += [f"method.{key}={value}" for key, value in settings.items()]
    flags = {"method": method, "backbone": backbone, "task": "words", "concepts": ("cat",), "limit": 1}
    registries = plugins.load([world])
    result = run(build(flags, overrides=overrides), out=out, registries=registries)
    module = tiny if backbone == "tiny" else tiny_flux
    (folder_of,) = out.glob(f"{backbone}/words/{method}/*/erasure")
    assert result.method == method
    return Erasure.load(folder_of, module.load(folder)).total()


@pytest.mark.parametrize("which", METHODS)
@pytest.mark.parametrize(("backbone", "vram"), SMALL)
def test_recomputed_activations_give_the_same_erasure(which, backbone, vram, world, tmp_path, request):
    folder = request.getfixturevalue("tiny_folder" if backbone == "tiny" else "tiny_flux_folder")
    method, own = METHODS[which]
    found = [
        erased(world, folder, tmp_path / gb, backbone=backbone, vram=gb, method=method, settings=COMMON | own)
        for gb in ("80", vram)
    ]
    kept, recomputed = found
    assert kept.keys() == recomputed.keys()
    assert any(to_dense(delta).abs().max() > 0 for delta in kept.values())
    for layer, delta in kept.items():
        torch.testing.assert_close(to_dense(recomputed[layer]), to_dense(delta), rtol=1e-3, atol=1e-6)


@pytest.fixture(params=["sd", "flux", "flux2"])
def pair(request, tiny_folder, tiny_flux_folder, tiny_flux2_folder):
    """The same model twice; the second recomputes."""
    families = {"sd": (tiny, tiny_folder), "flux": (tiny_flux, tiny_flux_folder), "flux2": (tiny_flux2, tiny_flux2_folder)}
    module, folder = families[request.param]
    plain, recomputing = module.load(folder), module.load(folder)
    recomputing.denoiser.enable_gradient_checkpointing()
    return plain, recomputing


def test_gradients_of_attention_are_the_same_after_the_hooks_are_gone(pair):
    gradients = []
    for backbone in pair:
        x, cond = backbone.latents([0]).requires_grad_(), backbone.encode(["a photo of a cat"])
        with attention_maps(backbone.denoiser) as maps:
            prediction = backbone.predict(x, torch.tensor([0.5]), cond)
        loss = prediction.square().mean() + torch.stack([m.square().mean() for m in maps.values()]).sum()
        seen = {name: value.detach().clone() for name, value in maps.items()}
        (twice,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        assert torch.equal(twice, x.grad)
        assert all(torch.equal(maps[name], value) for name, value in seen.items())
        assert not any(m._forward_hooks for m in backbone.denoiser.modules())
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_gradients_of_exchanged_weights_are_the_same_after_the_call(pair):
    gradients = []
    for backbone in pair:
        ctx = RunContext(backbone, (Words().concept("cat"),), Words(), component=default().components.get)
        linear = [n for n, m in backbone.denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
        weights = {name: (backbone.weight(name) * 1.1).requires_grad_() for name in linear}
        x, cond = backbone.latents([0]), backbone.encode(["a photo of a cat"])
        loss = Exchanged(ctx).predict(weights, x, torch.tensor([0.5]), cond).square().mean()
        loss.backward()
        gradients.append([w.grad for w in weights.values()])
        assert backbone.denoiser.is_gradient_checkpointing == (backbone is pair[1])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-8)
