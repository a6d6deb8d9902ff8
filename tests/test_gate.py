"""Cor. 3.4 at sampling: with the gate, nothing before tau0 differs from the base by a single bit."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from erasekit.backbones.schedule import ddpm_tau
from erasekit.erasures.deltas import LowRank
from erasekit.erasures.late_gate import LateGate
from erasekit.testing import tiny


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny.load(tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd"))


@pytest.fixture
def pipe(backbone):
    """A plain pipeline with an erasure loaded as adapters."""
    pipe, generator = backbone.pipeline(), torch.Generator().manual_seed(0)
    modules = dict(pipe.unet.named_modules())
    layers = {}
    for name in backbone.lora_targets("kv"):
        delta = LowRank(torch.randn(len(modules[name].weight), 2, generator=generator), torch.randn(2, 32, generator=generator))
        layers |= {f"unet.{name}.lora_A.weight": delta.down, f"unet.{name}.lora_B.weight": delta.up}
    pipe.load_lora_weights(layers, adapter_name="cat")
    return pipe


def latents(pipe, steps, gate=None):
    """The latents after every step."""
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return gate(pipe, index, timestep, tensors) if gate else tensors

    generator = [torch.Generator().manual_seed(s) for s in (1, 2)]
    arguments = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    pipe(["a cat", "a photo of a cat"], callback_on_step_end=callback, **arguments)
    return seen


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize(("tau0", "steps"), [(0.15, 10), (0.5, 7), (0.0, 5), (1.1, 5)])
def test_latents_before_tau0_are_the_bases(pipe, scheduler, tau0, steps):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    erased = latents(pipe, steps)
    pipe.disable_lora()
    base = latents(pipe, steps)
    pipe.enable_lora()
    pipe.scheduler.set_timesteps(steps)
    late = ddpm_tau(pipe.scheduler.timesteps) >= tau0 - 1e-6
    gate = LateGate(pipe, tau0=tau0)
    gated = latents(pipe, steps, gate)
    equal = [torch.equal(a, b) for a, b in zip(gated, base, strict=True)]
    assert equal == [not late[: k + 1].any() for k in range(steps)]
    if late.all():
        assert all(torch.equal(a, b) for a, b in zip(gated, erased, strict=True))
    again = latents(pipe, steps, gate)  # the gate is set for the next call
    assert all(torch.equal(a, b) for a, b in zip(gated, again, strict=True))
    gate.open()
    assert all(torch.equal(a, b) for a, b in zip(latents(pipe, steps), erased, strict=True))
