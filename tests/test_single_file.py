"""A checkpoint of one file is the same model as the folder that it was made from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from erasekit.backbones import single_file
from erasekit.backbones.sd import StableDiffusionConfig
from erasekit.errors import EnvironmentProblem
from tests import tiny

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, layers: int) -> str:
    """The name that CompVis' code gives a tensor of a UNet with `layers` layers in a block."""
    for ours, theirs in OUTER.items():
        if name.startswith(ours + "."):
            return f"model.diffusion_model.{theirs}{name.removeprefix(ours)}"
    for ours, theirs in RESNET.items():
        name = name.replace(f".{ours}.", f".{theirs}.") if ".resnets." in name else name
    if found := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", name):
        block, kind, k, rest = int(found[1]), found[2], int(found[3]), found[4]
        index = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else k)
        place = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
        return f"model.diffusion_model.input_blocks.{index}.{place}.{rest.removeprefix('conv.') if 'down' in kind else rest}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        index = 2 * int(found[2]) + (found[1] == "attentions")
        return f"model.diffusion_model.middle_block.{index}.{found[3]}"
    found = re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", name)
    block, kind, k, rest = int(found[1]), found[2], int(found[3]), found[4]
    index = block * (layers + 1) + (layers if kind == "upsamplers" else k)
    place = {"resnets": "0", "attentions": "1", "upsamplers": "1" if block == 0 else "2"}[kind]
    return f"model.diffusion_model.output_blocks.{index}.{place}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """The name that CompVis' code gives a tensor of an autoencoder."""
    if ".mid_block.attentions." in name:
        for ours, theirs in ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    return "first_stage_model." + name.replace("conv_shortcut", "nin_shortcut")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd", vae="kl")


@pytest.fixture
def checkpoint(folder, tmp_path) -> Path:
    """The pipeline of `folder` as one file, in CompVis' names."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    tensors = {unet_name(k, 1): t for k, t in pipe.unet.state_dict().items()}
    tensors |= {vae_name(k, len(pipe.vae.config.block_out_channels)): t for k, t in pipe.vae.state_dict().items()}
    prefix = "cond_stage_model.transformer.text_model."
    tensors |= {prefix + k.removeprefix("text_model."): t for k, t in pipe.text_encoder.state_dict().items()}
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
