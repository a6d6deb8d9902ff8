"""The main job on the shipped model: the concept is gone, the rest is there, and the file loads in plain diffusers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from erasekit.erasures.erasure import Erasure
from erasekit.erasures.late_gate import LateGate
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from erasekit_mini.backbone import MODELS

SHORT = ["method.steps=20", "method.trajectories=8", "method.clean_trajectories=24"]
CALL = {"num_inference_steps": 15, "guidance_scale": 4.0, "output_type": "np"}
PROMPTS = ["a nice image of a cat", "here is a picture of a dog"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(result, run directory) of a short run over cats."""
    out = tmp_path_factory.mktemp("runs")
    flags = {"method": "trace", "backbone": "sd15-mini", "task": "objects", "concepts": ("cat",), "limit": 18}
    config = build(flags, overrides=SHORT)
    return run(config, out=out), path_of(out, resolve(config, default()))


@pytest.fixture
def plain():
    """The shipped folder in plain diffusers."""
    pipe = StableDiffusionPipeline.from_pretrained(MODELS / "sd15-mini", safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments):
    return pipe(PROMPTS, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], **{**CALL, **arguments}).images


def test_the_concept_is_gone_and_the_rest_is_there(finished):
    metrics = finished[0].metrics
    assert metrics["acc_e"].base >= 0.9
    assert metrics["acc_s"].base >= 0.9
    assert metrics["acc_e"].value <= 0.06
    assert metrics["acc_g"].value <= 0.12
    assert metrics["acc_s"].value >= metrics["acc_s"].base - 0.06
    assert metrics["h_o"].value >= 0.9
    assert metrics["frechet[mini-classifier]"].value > 0


def test_everything_that_a_run_promises_is_there(finished):
    path = finished[1]
    names = ["results.json", "report.html", "scores.parquet", "certificate.json", "config.toml", "log.jsonl"]
    assert [name for name in names if not (path / name).is_file()] == []
    certificate = json.loads((path / "certificate.json").read_text())
    assert certificate["mean"]["to_neutral"] < 0.5, "erased embeddings are not where the neutral ones are"
    assert certificate["mean"]["other_drift"] < 1, "others move more than the concept is wide"


def test_the_file_in_plain_diffusers_draws_what_generate_draws(finished, plain, erasekit, tmp_path):
    from PIL import Image

    folder = finished[1] / "erasure"
    plain.load_lora_weights(str(folder), weight_name="cat.safetensors", adapter_name="cat")
    images = plain.image_processor.numpy_to_pil(draw(plain))
    done = erasekit("generate", PROMPTS[0], "--erasure", folder, "--concept", "cat", "--seed", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (drawn,) = (tmp_path / "out").glob("*.png")
    alone = plain(PROMPTS[0], generator=torch.Generator().manual_seed(1), **CALL).images
    expected = plain.image_processor.numpy_to_pil(alone)[0]
    assert np.array_equal(np.array(Image.open(drawn)), np.array(expected))
    assert images[0].size == (64, 64)


def test_parts_of_the_erasure_can_be_toggled(finished, plain):
    base = draw(plain)
    plain.load_lora_weights(str(finished[1] / "erasure"), weight_name="cat.safetensors", adapter_name="cat")
    erased = draw(plain)
    assert np.abs(erased[0] - base[0]).mean() > 0.02
    plain.disable_lora()
    assert np.array_equal(draw(plain), base)
    assert {part for parts in Erasure.load(finished[1] / "erasure").deltas.values() for part in parts} == {"refine", "adapter"}


def test_late_gate_keeps_the_early_latents(finished, plain):
    def latents(gate):
        seen = []

        def record(pipe, index, timestep, tensors):
            seen.append(tensors["latents"].clone())
            return gate(pipe, index, timestep, tensors) if gate else tensors

        draw(plain, output_type="latent", callback_on_step_end=record)
        return seen

    base = latents(None)
    plain.load_lora_weights(str(finished[1] / "erasure"), weight_name="cat.safetensors", adapter_name="cat")
    gated = latents(LateGate(plain, tau0=0.3))
    equal = [torch.equal(a, b) for a, b in zip(base, gated, strict=True)]
    assert equal == [k < 5 for k in range(15)]  # step k runs at tau k / 15 and leads to the latents of step k + 1


def test_the_same_run_again_is_the_same_erasure_and_the_same_numbers(finished, tmp_path):
    flags = {"method": "trace", "backbone": "sd15-mini", "task": "objects", "concepts": ("cat",), "limit": 18}
    again = run(build(flags, overrides=SHORT), out=tmp_path)
    assert again.erasure_sha256 == finished[0].erasure_sha256
    assert again.metrics == finished[0].metrics


def test_flux_mini_forgets_too(tmp_path):
    flags = {"method": "trace", "backbone": "flux-mini", "task": "objects", "concepts": ("cat",), "limit": 18}
    metrics = run(build(flags, overrides=[*SHORT, "method.eta=1.0", "method.steps=5"]), out=tmp_path).metrics
    assert metrics["acc_e"].base >= 0.9
    assert metrics["acc_s"].base >= 0.9
    assert metrics["acc_e"].value <= 0.06
    assert metrics["acc_g"].value <= 0.12
    assert metrics["acc_s"].value >= metrics["acc_s"].base - 0.06
