"""Exported files: every key is one that other programs map, and what they load draws the same images."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file

import erasekit
from erasekit.backbones.flux import Flux
from erasekit.backbones.held import of_diffusers
from erasekit.backbones.sd import StableDiffusion
from erasekit.cli import main
from erasekit.concepts import Concept
from erasekit.erasures.deltas import Dense, LowRank, distance, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.kohya import named, with_one_alpha
from erasekit.erasures.original import unet_name
from erasekit.erasures.strength import parse
from erasekit.erasures.tensors import rounded
from erasekit.errors import EnvironmentProblem, ErasekitError, UsageError
from erasekit.runs.exporting import export
from erasekit.testing import tiny
from erasekit_mini.backbone import FluxMini, Sd15Mini

MINIS = {"sd15-mini": Sd15Mini, "flux-mini": FluxMini}


def random_deltas(shapes, seed=0, size=0.02, rank=None):
    """A random low-rank delta for each (out, in), of ranks 1, 2 and 3 in turns."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for i, (name, (out, width)) in enumerate(shapes.items()):
        r = rank or 1 + i % 3
        sides = torch.randn(out, r, generator=generator), torch.randn(r, width, generator=generator)
        deltas[name] = LowRank(size * sides[0], size * sides[1])
    return deltas


def shapes_of(denoiser, keep=""):
    return {
        n: tuple(m.weight.shape) for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear) and re.search(keep, n)
    }


def skeleton(kind):
    name, config = kind.architecture
    with torch.device("meta"):
        return of_diffusers(name).from_config(config)


def made_up(backbone, deltas, *, concepts=("cat",), **changes):
    """An erasure with these deltas, the same for each concept."""
    names = [Concept.parse(name) for name in concepts]
    parts = {name: {"adapter": deltas} for name in concepts}
    return replace(Erasure.of(backbone, names, method="made-up", config={}, deltas=parts), **changes)


def pairs_of(tensors):
    """{name: (down, up, alpha)} of a kohya file, each key used once."""
    suffixes = Counter(key.partition(".")[2] for key in tensors)
    assert set(suffixes) == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert len(set(suffixes.values())) == 1
    names = {key.partition(".")[0] for key in tensors}
    return {n: (tensors[f"{n}.lora_down.weight"], tensors[f"{n}.lora_up.weight"], tensors[f"{n}.alpha"]) for n in names}


# The rules that the programs publish, as facts.
A1111_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def a1111(key):
    """The layer of the original UNet that A1111 gives a key to: extensions-builtin/Lora/networks.py, for two layers a block."""
    if found := re.fullmatch(r"lora_unet_time_embedding_linear_(\d)", key):
        return f"time_embed_{2 * int(found[1]) - 2}"
    if found := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)", key):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block_{place}_{A1111_RESNET.get(found[3], found[3])}"
    found = re.fullmatch(r"lora_unet_(down|up)_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", key)
    side, block, kind, k, rest = found.groups()
    index = 3 * int(block) + int(k) + (side == "down")
    return (
        f"{'input' if side == 'down' else 'output'}_blocks_{index}_{int(kind == 'attentions')}_{A1111_RESNET.get(rest, rest)}"
    )


def test_stable_diffusion_at_full_width_maps_key_by_key():
    """Every linear layer of SD1.5: A1111's rule finds an original layer for each key, and diffusers' converter, which goes from
    there to its own names, comes back to the layer that the delta is of. ComfyUI and Forge know diffusers' own paths.
    """
    unet = skeleton(StableDiffusion)
    deltas = random_deltas(shapes_of(unet))
    keys = named(deltas, "unet")
    assert keys.keys() == {f"lora_unet_{name.replace('.', '_')}" for name in deltas}
    assert len(keys) == len(deltas) == 184
    original = {unet_name(name, 2): tensor for name, tensor in unet.state_dict().items()}
    assert "" not in original
    modules = {name.removesuffix(".weight").replace(".", "_"): name for name in original if name.endswith(".weight")}
    reached = {a1111(key): delta for key, delta in keys.items()}
    assert len(reached) == len(keys)
    assert reached.keys() <= modules.keys(), "a key is left over"
    weights = {f"model.diffusion_model.{n}": t for n, t in original.items()}
    for layer, delta in reached.items():
        assert tuple(original[modules[layer]].shape) == (len(delta.up), delta.down.shape[1])
        weights[f"model.diffusion_model.{modules[layer]}"] = delta.up
    back = convert_ldm_unet_checkpoint(weights, config=unet.config)
    assert all(back[f"{name}.weight"] is delta.up for name, delta in deltas.items())


def test_flux_at_full_width_maps_key_by_key():
    """Every linear layer of FLUX.1-dev: each key is of a layer of the original code, none of which is left out, and diffusers'
    converter takes the stacked factors apart into those that went in. ComfyUI and Forge know the original paths.
    """
    transformer = skeleton(Flux)
    shapes = shapes_of(transformer)
    deltas = random_deltas(shapes)
    keys = named(deltas, "transformer")
    double = ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
    single = ("linear1", "linear2", "modulation_lin")
    outer = ("img_in", "txt_in", "final_layer_linear", "final_layer_adaLN_modulation_1")
    outer += tuple(f"{which}_in_{side}_layer" for which in ("time", "vector", "guidance") for side in ("in", "out"))
    expected = {f"lora_unet_double_blocks_{i}_{s}_{p}" for i in range(19) for s in ("img", "txt") for p in double}
    expected |= {f"lora_unet_single_blocks_{i}_{p}" for i in range(38) for p in single} | {f"lora_unet_{p}" for p in outer}
    assert keys.keys() == expected
    ups = {f"{_dotted(key)}.weight": delta.up for key, delta in keys.items()}
    ups |= {name.replace(".weight", ".bias"): t[:, 0] for name, t in ups.items()}
    for i in range(38):
        blocks = [f"single_blocks.{i}.norm"] + [f"double_blocks.{i}.{s}_attn.norm" for s in ("img", "txt") if i < 19]
        ups |= {f"{b}.{n}_norm.scale": torch.zeros(1) for b in blocks for n in ("query", "key")}
    back = convert_flux_transformer_checkpoint_to_diffusers(ups)
    for module, delta in deltas.items():
        (key,) = named({module: delta}, "transformer")
        low = keys[key]
        probe = torch.randn(shapes[module][1], generator=torch.Generator().manual_seed(1))
        found = back[f"{module}.weight"] @ (low.down @ probe)
        assert torch.allclose(found, delta.up @ (delta.down @ probe), atol=1e-4), module


def _dotted(key):
    """A kohya key as the original layer's path."""
    name = re.sub(r"lora_unet_((?:double|single)_blocks)_(\d+)_", r"\1.\2.", key).removeprefix("lora_unet_")
    for joined, path in {
        "attn_": "attn.",
        "mlp_": "mlp.",
        "mod_lin": "mod.lin",
        "modulation_lin": "modulation.lin",
        "in_in_layer": "in.in_layer",
        "in_out_layer": "in.out_layer",
        "final_layer_linear": "final_layer.linear",
        "final_layer_adaLN_modulation_1": "final_layer.adaLN_modulation.1",
    }.items():
        name = name.replace(joined, path)
    return name


def test_a_layer_that_the_format_has_not_is_said():
    low = LowRank(torch.ones(2, 1), torch.ones(1, 2))
    for prefix in ("unet", "transformer"):
        with pytest.raises(UsageError, match=r"no name for 'encoder\.layer'.*--to diffusers"):
            named({"encoder.layer": low}, prefix)


def test_parts_that_have_no_delta_are_zero():
    values = LowRank(torch.ones(8, 2), torch.ones(2, 8))
    (low,) = named({"single_transformer_blocks.3.attn.to_v": values}, "transformer").values()
    assert to_dense(low).shape == (8 * 7, 8)
    assert torch.equal(to_dense(low)[16:24], to_dense(values))
    assert to_dense(low).abs().sum() == to_dense(values).abs().sum()


@pytest.fixture(scope="module", params=MINIS)
def mini(request, tmp_path_factory):
    """(name, backbone, folder of an erasure): real models, random deltas that change every image."""
    backbone = MINIS[request.param].load(MINIS[request.param].Config(device="cpu"))
    folder = tmp_path_factory.mktemp(request.param) / "erasure"
    made_up(backbone, random_deltas(shapes_of(backbone.denoiser), size=0.1)).save(folder)  # of ranks 1 to 3
    return request.param, backbone, folder


def draw(pipe, name):
    pipe.set_progress_bar_config(disable=True)
    words = {"guidance_scale": 4.0} if name == "sd15-mini" else dict(FluxMini.call)
    generator = [torch.Generator().manual_seed(s) for s in (1, 2)]
    return pipe(["a cat", "a photo of a ship"], num_inference_steps=8, generator=generator, output_type="np", **words).images


def plain(name, lora=None):
    pipe = DiffusionPipeline.from_pretrained(erasekit.where(name))
    if lora:
        pipe.load_lora_weights(str(lora))
    return pipe


def forge(hidden):
    """{layer of diffusers: key and rows}, as Forge has it (packages_3rdparty/comfyui_lora_collection, flux_to_diffusers)."""
    rows = {}
    for i in range(2):
        for ours, theirs in (("to_{}", "img"), ("add_{}_proj", "txt")):
            for k, which in enumerate("qkv"):
                key = f"double_blocks_{i}_{theirs}_attn_qkv"
                rows[f"transformer_blocks.{i}.attn.{ours.format(which)}"] = key, k * hidden, hidden
        for ours, theirs in {
            "attn.to_out.0": "img_attn_proj",
            "attn.to_add_out": "txt_attn_proj",
            "norm1.linear": "img_mod_lin",
            "norm1_context.linear": "txt_mod_lin",
            "ff.net.0.proj": "img_mlp_0",
            "ff.net.2": "img_mlp_2",
            "ff_context.net.0.proj": "txt_mlp_0",
            "ff_context.net.2": "txt_mlp_2",
        }.items():
            rows[f"transformer_blocks.{i}.{ours}"] = f"double_blocks_{i}_{theirs}", 0, None
    for i in range(4):
        for k, which in enumerate("qkv"):
            rows[f"single_transformer_blocks.{i}.attn.to_{which}"] = f"single_blocks_{i}_linear1", k * hidden, hidden
        rows[f"single_transformer_blocks.{i}.proj_mlp"] = f"single_blocks_{i}_linear1", 3 * hidden, 4 * hidden
        rows[f"single_transformer_blocks.{i}.norm.linear"] = f"single_blocks_{i}_modulation_lin", 0, None
        rows[f"single_transformer_blocks.{i}.proj_out"] = f"single_blocks_{i}_linear2", 0, None
    rows |= {
        "x_embedder": ("img_in", 0, None),
        "context_embedder": ("txt_in", 0, None),
        "proj_out": ("final_layer_linear", 0, None),
    }
    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for k, side in ((1, "in"), (2, "out")):
            rows[f"time_text_embed.{ours}_embedder.linear_{k}"] = f"{theirs}_in_{side}_layer", 0, None
    return rows | {"norm_out.linear": ("final_layer_adaLN_modulation_1", 0, None)}


def in_forge(pipe, file):
    """The file merged into a FLUX pipeline by Forge's map; diffusers leaves out its outer layers, and wants 3072 dimensions."""
    found, transformer = pairs_of(load_file(file)), pipe.transformer
    rows = forge(transformer.inner_dim)
    assert rows.keys() == shapes_of(transformer).keys()
    assert {f"lora_unet_{key}" for key, _, _ in rows.values()} == found.keys()
    with torch.no_grad():
        for module, (key, first, n) in rows.items():
            down, up, alpha = found[f"lora_unet_{key}"]
            change = alpha / len(down) * (up.float() @ down.float())
            change = change[first : None if n is None else first + n]
            if module == "norm_out.linear":
                change = torch.cat([*reversed(change.chunk(2))])
            transformer.get_submodule(module).weight += change
    return pipe


def test_what_is_exported_draws_the_same_without_erasekit(mini, tmp_path):
    """Seen, as the largest difference of a pixel (of 255) from the erasure's own file, on sd15-mini and on flux-mini:

    diffusers float32 0, 0; float16 .06, .13; bfloat16 .26, 1.2; kohya float32 0, .001, halves as diffusers; merged .001, .001.
    """
    name, _, folder = mini
    expected = draw(plain(name, folder / "all.safetensors"), name)
    assert np.abs(draw(plain(name), name) - expected).max() > 0.2
    worst = {}
    for dtype in ("float32", "float16", "bfloat16"):
        lora = export(folder, "diffusers", tmp_path / f"lora-{dtype}", dtype=dtype).path
        kohya = export(folder, "kohya", tmp_path / f"{dtype}.safetensors", dtype=dtype).path
        worst[f"diffusers {dtype}"] = np.abs(draw(plain(name, lora), name) - expected).max()
        pipe = plain(name, kohya) if name == "sd15-mini" else in_forge(plain(name), kohya)
        worst[f"kohya {dtype}"] = np.abs(draw(pipe, name) - expected).max()
    merged = export(folder, "merged", tmp_path / "merged", dtype="float32").path
    worst["merged float32"] = np.abs(draw(DiffusionPipeline.from_pretrained(merged), name) - expected).max()
    shown = {form: round(float(255 * value), 3) for form, value in worst.items()}
    limits = {"float32": 0.05, "float16": 1, "bfloat16": 4}
    assert all(value < limits[form.split()[1]] for form, value in shown.items()), shown


def test_a_kohya_file_says_what_it_is_and_its_bytes_are_the_same_each_time(mini, tmp_path):
    name, _, folder = mini
    written = [export(folder, "kohya", tmp_path / f"{i}" / "no-cat.safetensors", dtype="bfloat16") for i in range(2)]
    paths = [each.path for each in written]
    assert ("export --to diffusers" in written[0].load) == (name == "flux-mini"), "diffusers drops some of FLUX's layers"
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with safe_open(paths[0], "pt") as file:
        said = file.metadata()
    flux = name == "flux-mini"
    assert said["modelspec.architecture"] == ("flux-1-dev/lora" if flux else "stable-diffusion-v1/lora")
    assert said["modelspec.sai_model_spec"] == "1.0.1"
    assert {f"modelspec.{k}" for k in ("implementation", "title", "resolution", "date", "description")} <= said.keys()
    assert said["ss_network_module"] == ("networks.lora_flux" if flux else "networks.lora")
    assert said["ss_network_dim"] == "Dynamic"
    assert said["ss_output_name"] == "no-cat"
    assert said["modelspec.hash_sha256"] == f"0x{said['sshs_model_hash']}"
    layers = pairs_of(load_file(paths[0])).values()
    assert all(len(down) == up.shape[1] for down, up, _ in layers)
    assert {alpha.item() for _, _, alpha in layers} == {max(len(down) for down, _, _ in layers)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kohyas_layers_of_any_rank_are_the_deltas(dtype):
    """Queries, keys and values of full rank: stacked, they have more ranks than the layer is wide."""
    shapes = {f"transformer_blocks.0.attn.to_{which}": (8, 8) for which in "qkv"} | {"context_embedder": (8, 16)}
    deltas = random_deltas(shapes, rank=8) | random_deltas({"proj_out": (8, 8)}, rank=1)
    low, alpha = with_one_alpha(named(rounded(deltas, getattr(torch, dtype))[0], "transformer"))
    assert alpha == 24
    for name, delta in named(deltas, "transformer").items():
        found = alpha / len(low[name].down) * (low[name].up.double() @ low[name].down.double())
        error = (found - delta.up.double() @ delta.down.double()).norm() / (delta.up @ delta.down).norm()
        assert error < {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype], name


def test_a_merged_model_is_of_its_own_type_unless_told(mini, tmp_path):
    name, _, folder = mini
    written = export(folder, "merged", tmp_path / "m")
    assert 0 < written.costs["rounding"] < 1e-2
    part = "unet" if name == "sd15-mini" else "transformer"
    assert {t.dtype for t in load_file(written.path / part / "diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    card = (written.path / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "without cat" in card


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    """A tiny Stable Diffusion with the VAE of the real one: its folder and its backbone."""
    folder = tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd", vae="kl")
    return folder, tiny.load(folder)


def tiny_export(folder, *arguments, base, world, **more):
    from erasekit.registration.plugins import load

    return export(folder, *arguments, backbone={"path": str(base), "device": "cpu"}, registries=load([world]), **more)


def test_one_file_of_a_stable_diffusion_is_the_merged_folder(kl, tmp_path, world):
    base, backbone = kl
    made_up(backbone, random_deltas(shapes_of(backbone.denoiser), size=0.1)).save(tmp_path / "e")
    folder = tiny_export(tmp_path / "e", "merged", tmp_path / "m", base=base, world=world).path
    file = tiny_export(tmp_path / "e", "merged", tmp_path / "m.safetensors", base=base, world=world).path
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == "stable-diffusion-v1"
    one = StableDiffusionPipeline.from_single_file(str(file), config=str(base))
    other = StableDiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part
    moved = [
        k
        for k, t in StableDiffusionPipeline.from_pretrained(base).unet.state_dict().items()
        if not torch.equal(t, other.unet.state_dict()[k])
    ]
    assert len(moved) == len(shapes_of(backbone.denoiser))


def test_a_base_in_shards_of_a_variant_without_its_checker_merges_into_a_plain_folder(kl, tmp_path, world):
    """As the hub's cache holds it: parts that erasekit does not use were not downloaded, though the index names them."""
    pipe = StableDiffusionPipeline.from_pretrained(kl[0])
    base = tmp_path / "base"
    pipe.to(torch.float16).save_pretrained(base, variant="fp16", max_shard_size="60KB")
    assert len(list((base / "unet").glob("*.safetensors"))) > 1
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (base / "model_index.json").write_text(json.dumps(index))
    backbone = tiny.load(base)
    deltas = random_deltas(shapes_of(backbone.denoiser), size=0.1)
    made_up(backbone, deltas).save(tmp_path / "e")
    folder = tiny_export(tmp_path / "e", "merged", tmp_path / "m", base=base, world=world, dtype="float32").path
    merged = DiffusionPipeline.from_pretrained(folder).unet
    for name, delta in deltas.items():
        expected = backbone.denoiser.get_submodule(name).weight + to_dense(delta)
        assert torch.allclose(merged.get_submodule(name).weight, expected, atol=1e-6)


def test_another_base_is_refused(kl, tmp_path, world):
    other = tiny.save_pipeline(tmp_path / "other", seed=1)
    made_up(kl[1], random_deltas(shapes_of(kl[1].denoiser, "attn2"))).save(tmp_path / "e")
    with pytest.raises(UsageError, match="not for 'other'"):
        tiny_export(tmp_path / "e", "merged", tmp_path / "m", base=other, world=world)
    assert not (tmp_path / "m").exists()


def test_a_dense_edit_becomes_a_lora_and_its_error_is_said(kl, tmp_path, world):
    """The error of rank r is that of the dropped singular values, by numpy in float64."""
    base, backbone = kl
    generator = torch.Generator().manual_seed(0)
    deltas = {n: Dense(0.1 * torch.randn(*s, generator=generator)) for n, s in shapes_of(backbone.denoiser, "attn2").items()}
    made_up(backbone, deltas).save(tmp_path / "e")
    written = tiny_export(tmp_path / "e", "kohya", tmp_path / "k.safetensors", base=base, world=world, rank=3)
    values = [np.linalg.svd(d.weight.double().numpy(), compute_uv=False) for d in deltas.values()]
    dropped, size = sum((v[3:] ** 2).sum() for v in values), sum((v**2).sum() for v in values)
    assert written.costs["rank"] == pytest.approx((dropped / size) ** 0.5, rel=1e-5)
    found = {n.removeprefix("lora_unet_"): Dense(up @ down) for n, (down, up, _) in pairs_of(load_file(written.path)).items()}
    assert distance(found, {n.replace(".", "_"): d for n, d in deltas.items()}) == pytest.approx(
        written.costs["rank"], rel=1e-4
    )


def test_concepts_and_strengths_can_be_chosen(kl, tmp_path, world):
    base, backbone = kl
    deltas = random_deltas(shapes_of(backbone.denoiser, "attn2"))
    made_up(backbone, deltas, concepts=("cat", "dog")).save(tmp_path / "e")

    def exported(**more):
        path = tiny_export(tmp_path / "e", "kohya", tmp_path / "k.safetensors", base=base, world=world, force=True, **more).path
        return {n: float((up @ down).norm()) for n, (down, up, _) in pairs_of(load_file(path)).items()}

    whole, cat, half = exported(), exported(concepts=["cat"]), exported(strength={"cat": 0.5, "dog": 0.0})
    assert all(whole[n] == pytest.approx(2 * cat[n], rel=1e-5) for n in whole)
    assert all(half[n] == pytest.approx(0.5 * cat[n], rel=1e-5) for n in whole)
    with pytest.raises(UsageError, match="Did you mean 'cat'"):
        exported(strength={"cta": 1.0})
    with pytest.raises(UsageError, match="There are: 'cat', 'dog'"):
        exported(strength={"zebra": 1.0})
    with pytest.raises(UsageError, match="finite"):
        exported(strength=float("nan"))


def test_strengths_are_read():
    assert parse([]) is None
    assert parse(["0.5"]) == 0.5
    assert parse(["cat=0.5", "Orla Vint=1.5"]) == {"cat": 0.5, "Orla Vint": 1.5}
    for wrong in (["half"], ["cat=half"], ["0.5", "cat=1"], ["cat"]):
        with pytest.raises(UsageError, match="strength"):
            parse(wrong)


def test_guidance_has_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["erase", "-m", "negative-prompt", "-c", "cat", "-s", "protocol.steps=1", "--out", "steered"]
    assert main(arguments) == 0
    capsys.readouterr()
    for to in ("diffusers", "kohya", "merged"):
        assert main(["export", "steered", "--to", to]) == 2
        out, err = capsys.readouterr()
        assert "changes no weights" in err
        assert err.count("\n") == 1
        assert not out


def test_what_is_there_is_kept_unless_forced(mini, tmp_path, capsys, monkeypatch):
    name, _, folder = mini
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(folder), "--to", "kohya"]) == 0
    file = Path(f"erased-cat-{name}.safetensors")
    assert file.is_file()
    capsys.readouterr()
    assert main(["export", str(folder), "--to", "kohya"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", str(folder), "--to", "kohya", "--force", "--files", "float16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(file)
    assert 0 < said["rounding"] < 1e-2
    assert main(["export", str(folder), "--out", str(folder), "--force"]) == 2
    assert (folder / "erasure.json").is_file()
    assert main(["export", str(folder), "--to", "koyha"]) == 2
    assert "Did you mean 'kohya'?" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to(mini, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((EnvironmentProblem, ErasekitError), match="Cannot write"):
        export(mini[2], "kohya", tmp_path / "file" / "k.safetensors")


def test_a_plugin_adds_a_form(mini, tmp_path, monkeypatch):
    from erasekit.registration.plugins import load

    (tmp_path / "forms.py").write_text(
        "from erasekit import hookimpl\n"
        "from erasekit.erasures.exporting import Exported, Exporter\n"
        "class Names(Exporter):\n"
        "    suffix = '.txt'\n"
        "    def write(self, order):\n"
        "        order.out.write_text('\\n'.join(order.deltas))\n"
        "        return Exported(order.out, order.costs(0.0), 'read it')\n"
        "@hookimpl\n"
        "def register_exporters(register):\n"
        "    register('names', Names)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "forms", None)
    monkeypatch.delitem(sys.modules, "forms")
    written = export(mini[2], "names", registries=load([tmp_path / "forms.py"]))
    assert "attn" in written.path.read_text()


def test_the_config_of_a_backbone_is_checked(mini, tmp_path):
    with pytest.raises(UsageError, match=r"backbone\.pth.*Did you mean"):
        export(mini[2], "merged", tmp_path / "m", backbone={"pth": "x"})
