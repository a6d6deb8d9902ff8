"""A checkpoint of one file is the same model as the folder that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from erasekit.backbones import single_file
from erasekit.backbones.sd import StableDiffusionConfig
from erasekit.erasures import original
from erasekit.errors import EnvironmentProblem
from erasekit.testing import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd", vae="kl")


@pytest.fixture
def checkpoint(folder, tmp_path) -> Path:
    """The pipeline of `folder` as one file, in CompVis' names."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    parts = {name: getattr(pipe, name).state_dict() for name in ("unet", "vae", "text_encoder")}
    tensors = original.checkpoint(parts, layers=1, levels=len(pipe.vae.config.block_out_channels))
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setattr(single_file, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "erasekit"


def load(path, like, dtype="float32"):
    return tiny.TinySD.load(StableDiffusionConfig(path=str(path), like=str(like), device="cpu", dtype=dtype))


def test_a_single_file_is_the_model_of_its_folder(checkpoint, folder, cache):
    backbone, original = load(checkpoint, folder), tiny.load(folder)
    assert (backbone.source, backbone.revision) == ("mine.safetensors", "")
    assert backbone.fingerprint() == original.fingerprint()
    cond = backbone.encode(["a photo of a cat"])
    assert torch.equal(cond.tokens, original.encode(["a photo of a cat"]).tokens)
    x, tau = original.latents([1]), torch.tensor([0.4])
    assert torch.equal(backbone.predict(x, tau, cond), original.predict(x, tau, cond))
    assert torch.equal(backbone.decode(x), original.decode(x))
    assert len(list(cache.iterdir())) == 1


def test_it_is_converted_once(checkpoint, folder, cache, monkeypatch):
    load(checkpoint, folder)
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", None)
    assert load(checkpoint, folder).source == "mine.safetensors"


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_what_cannot_be_read_is_one_line(checkpoint, folder, cache, damage):
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    else:
        save_file({"something": torch.zeros(2)}, checkpoint)
    with pytest.raises(EnvironmentProblem, match=r"backbone.like=FOLDER$") as error:
        load(checkpoint, folder)
    assert "\n" not in str(error.value)
    assert not list(cache.glob("*")) if cache.exists() else True


def test_a_file_that_is_not_there_is_named(tmp_path, folder):
    with pytest.raises(EnvironmentProblem, match=r"mine\.safetensors"):
        load(tmp_path / "nowhere" / "mine.safetensors", folder)
