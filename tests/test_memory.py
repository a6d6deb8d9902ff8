"""How a model is held for a size of GPU, and what is said when it was too large."""

from __future__ import annotations

import pytest
import torch

from erasekit.backbones.flux import Flux
from erasekit.backbones.flux2 import Flux2KleinBase4B, Flux2KleinBase9B
from erasekit.backbones.memory import VRAM_GB, out_of_memory, vram_gb
from erasekit.backbones.sd import StableDiffusion
from erasekit.backbones.sd3 import StableDiffusion35Large, StableDiffusion35Medium
from erasekit.errors import EnvironmentProblem
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.runner import run
from erasekit.testing import tiny_flux

PROMPT = ["a photo of a cat"]
FULL_GPU = '''
import torch
from erasekit import Method, hookimpl

class Greedy(Method):
    """Asks for more than there is."""
    name = "greedy"
    def erase(self, ctx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB.")

@hookimpl
def register_methods(register):
    register("greedy", Greedy, summary="too large")
'''


@pytest.fixture(scope="module")
def whole(tiny_flux_folder):
    return tiny_flux.load(tiny_flux_folder)


def test_a_size_is_planned_for():
    assert vram_gb("24", torch.device("cpu")) == 24
    assert vram_gb("auto", torch.device("cpu")) == VRAM_GB[-1]
    large = (StableDiffusion35Medium, StableDiffusion35Large, Flux2KleinBase4B, Flux2KleinBase9B)
    for backbone in (StableDiffusion, Flux, *large):
        assert tuple(backbone.holding) == VRAM_GB


@pytest.mark.parametrize("vram", ["8", "48"])
def test_a_smaller_gpu_gives_the_same_predictions_gradients_and_images(vram, whole, tiny_flux_folder):
    small = tiny_flux.load(tiny_flux_folder, vram=vram)
    seen = []
    for backbone in (whole, small):
        cond, x = backbone.encode(PROMPT), backbone.latents([0]).requires_grad_()
        y = backbone.predict(x, torch.tensor([0.5]), cond)
        y.square().sum().backward()
        call = backbone.call_arguments(cond, empty=backbone.encode([""]), guidance=2.0)
        generator = torch.Generator().manual_seed(0)
        size = {"height": 16, "width": 16, "num_inference_steps": 2, "generator": generator}
        images = backbone.pipeline(encoders=False)(**call, **size, output_type="pt").images
        seen.append((y.detach(), x.grad, images))
    for mine, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert small.denoiser.is_gradient_checkpointing


def test_encoders_make_room_for_the_denoiser(tiny_flux_folder):
    small = tiny_flux.load(tiny_flux_folder, vram="48")
    cond = small.encode(PROMPT)
    assert set(small._parts) == {"text_encoder", "text_encoder_2"}
    assert small.denoiser is not None
    assert set(small._parts) == {"transformer"}
    assert torch.equal(small.encode(PROMPT).tokens, cond.tokens)
    assert set(small._parts) == {"transformer"}


def test_four_bits_without_bitsandbytes_say_what_to_install(tiny_flux_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    small = tiny_flux.load(tiny_flux_folder, vram="24")
    with pytest.raises(EnvironmentProblem, match=r"--vram 24 needs bitsandbytes: pip install 'erasekit\[nf4\]'"):
        small.denoiser  # noqa: B018


def test_out_of_memory_names_the_next_smaller_setting(tiny_folder, tmp_path, world):
    (tmp_path / "greedy.py").write_text(FULL_GPU)
    registries = plugins.load([world, tmp_path / "greedy.py"])
    flags = {"method": "greedy", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
    overrides = [f"backbone.path={tiny_folder}", "backbone.device=cpu", "backbone.vram=48"]
    with pytest.raises(EnvironmentProblem, match=r"ran out of memory with --vram 48 .* Try --vram 32\."):
        run(build(flags, overrides=overrides), out=tmp_path / "runs", registries=registries)
    assert "Use a smaller batch" in str(out_of_memory(RuntimeError("full"), 8))
