"""Erasures on disk: the same in plain diffusers, and every kind of damage refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.functional import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from erasekit.concepts import Concept
from erasekit.erasures.deltas import Dense, LowRank, merged, norm, summed, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into
from erasekit.erasures.manifest import digest, file_stems, read_manifest, write_manifest
from erasekit.errors import EnvironmentProblem, ErasekitError, UsageError
from erasekit.events import Progressed, heard
from erasekit.testing import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def backbone(folder):
    return tiny.load(folder)


def random_deltas(backbone, scope, ranks, seed, size=0.1):
    """Deltas of different ranks, one after the other."""
    generator, modules = torch.Generator().manual_seed(seed), dict(backbone.denoiser.named_modules())
    deltas = {}
    for i, name in enumerate(backbone.lora_targets(scope)):
        out, width, rank = *modules[name].weight.shape, ranks[i % len(ranks)]
        deltas[name] = LowRank(
            size * torch.randn(out, rank, generator=generator), size * torch.randn(rank, width, generator=generator)
        )
    return deltas


@pytest.fixture
def erasure(backbone):
    return Erasure(
        method="made-up",
        config={"rank": 2, "words": ("a", "b")},
        concepts=(Concept.parse("cat:kitten"), Concept.parse("Orla Vint")),
        backbone="tiny",
        prefix="unet",
        base={"repo": backbone.source, "revision": "", "sha256": backbone.fingerprint(backbone.lora_targets("attention"))},
        deltas={
            "cat": {
                "refine": random_deltas(backbone, "kv", [1, 3], 0),
                "adapter": random_deltas(backbone, "attention", [2], 1),
            },
            "Orla Vint": {"refine": random_deltas(backbone, "kv", [1], 2)},
        },
    )


def draw(pipe, **arguments):
    generator = [torch.Generator().manual_seed(s) for s in (1, 2)]
    prompts = ["a photo of a cat", "a dog"]
    return pipe(prompts, num_inference_steps=3, generator=generator, output_type="np", **arguments).images


def test_plain_load_lora_weights_gives_the_merged_model(backbone, erasure, tmp_path):
    erasure.save(tmp_path / "e")
    pipe = backbone.pipeline()
    pipe.load_lora_weights(tmp_path / "e", weight_name="cat.safetensors", adapter_name="cat")
    pipe.load_lora_weights(tmp_path / "e", weight_name="Orla-Vint.safetensors", adapter_name="vint")
    x, tau, cond = backbone.latents([1, 2]), torch.tensor([0.2, 0.9]), backbone.encode(["a cat", "a dog"])
    timestep = torch.tensor([799, 99])

    def difference(adapters, deltas):
        pipe.set_adapters(adapters)
        with torch.no_grad(), merged(backbone.denoiser, deltas):
            plain = pipe.unet(x, timestep, encoder_hidden_states=cond.tokens).sample
            return (plain - backbone.predict(x, tau, cond)).abs().max()

    with torch.no_grad():
        with merged(backbone.denoiser, erasure.total()):
            moved = backbone.predict(x, tau, cond)
        assert (moved - backbone.predict(x, tau, cond)).abs().max() > 1e-2
    assert difference(["cat", "vint"], erasure.total()) < 1e-5
    assert difference(["cat"], summed(list(erasure.deltas["cat"].values()))) < 1e-5
    assert difference(["vint"], erasure.deltas["Orla Vint"]["refine"]) < 1e-5


def test_parts_load_on_their_own(backbone, erasure, tmp_path):
    erasure.save(tmp_path / "e")
    pipe = backbone.pipeline()
    pipe.load_lora_weights(tmp_path / "e", weight_name="parts/cat.refine.safetensors", adapter_name="refine")
    assert len(get_peft_model_state_dict(pipe.unet, adapter_name="refine")) == 2 * len(backbone.text_sites())
    assert not (tmp_path / "e" / "parts" / "Orla-Vint.refine.safetensors").exists()  # its only part is the whole


def test_one_concept_is_one_file_under_two_names(backbone, erasure, tmp_path, monkeypatch):
    """Linked where the disk has links and copied where it has none, both with the same hashes."""
    one = replace(erasure, deltas={"cat": erasure.deltas["cat"]}, concepts=erasure.concepts[:1])
    linked = one.save(tmp_path / "linked")
    assert (tmp_path / "linked" / "all.safetensors").samefile(tmp_path / "linked" / "cat.safetensors")
    erasure.save(tmp_path / "two")
    assert not (tmp_path / "two" / "all.safetensors").samefile(tmp_path / "two" / "cat.safetensors")

    def refuse(*names):
        raise OSError

    monkeypatch.setattr("os.link", refuse)
    assert one.save(tmp_path / "copied") == linked
    assert not (tmp_path / "copied" / "all.safetensors").samefile(tmp_path / "copied" / "cat.safetensors")
    for name in ("linked", "copied"):
        pipe = backbone.pipeline()
        assert load_into(pipe, tmp_path / name) == ["all"]
        assert set(Erasure.load(tmp_path / name).total()) == set(one.total())


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_compact_files_say_what_they_cost(backbone, erasure, tmp_path, dtype, most):
    """Also of factors whose sizes are far apart, for which half precision has no room."""
    apart = {name: LowRank(1e-6 * d.up, 1e2 * d.down) for name, d in erasure.deltas["cat"]["refine"].items()}
    one = replace(erasure, deltas={"cat": {"refine": apart}})
    one.save(tmp_path / "e", dtype=dtype)
    manifest, loaded = read_manifest(tmp_path / "e"), Erasure.load(tmp_path / "e").total()
    assert {t.dtype for t in load_file(tmp_path / "e" / "cat.safetensors").values()} == {getattr(torch, dtype)}
    assert manifest["dtype"] == dtype
    assert manifest["ranks"] == {"cat.safetensors": 3, "all.safetensors": 3}
    wrong = sum((to_dense(loaded[n]).double() - to_dense(d).double()).square().sum() for n, d in apart.items())
    size = sum(to_dense(d).double().square().sum() for d in apart.values())
    assert manifest["rounding"] <= most
    if most:
        assert manifest["rounding"] == pytest.approx(float((wrong / size).sqrt()), rel=1e-2)
        assert load_into(backbone.pipeline(), tmp_path / "e") == ["all"]


def test_files_hold_what_save_lora_weights_writes(backbone, erasure, tmp_path):
    erasure.save(tmp_path / "e")
    file = tmp_path / "e" / "cat.safetensors"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers={k.removeprefix("unet."): v for k, v in load_file(file).items()},
        unet_lora_adapter_metadata={k.removeprefix("unet."): v for k, v in header.items()},
        weight_name="cat.safetensors",
    )
    with safe_open(tmp_path / "theirs" / "cat.safetensors", "pt") as theirs, safe_open(file, "pt") as ours:
        assert theirs.metadata()["lora_adapter_metadata"] == ours.metadata()["lora_adapter_metadata"]
        assert set(theirs.keys()) == set(ours.keys())
        assert all(torch.equal(theirs.get_tensor(k), ours.get_tensor(k)) for k in ours.keys())  # noqa: SIM118


def test_load_into_equals_plain_loading_bit_for_bit(backbone, erasure, tmp_path):
    erasure.save(tmp_path / "e")
    ours, plain = backbone.pipeline(), backbone.pipeline()
    base = draw(ours)
    assert load_into(ours, tmp_path / "e") == ["all"]
    plain.load_lora_weights(tmp_path / "e", weight_name="all.safetensors", adapter_name="everything")
    images = draw(ours)
    assert (images == draw(plain)).all()
    assert abs(images - base).max() > 1e-3
    ours.disable_lora()
    assert (draw(ours) == base).all()


def test_concepts_can_be_loaded_one_by_one(backbone, erasure, tmp_path):
    erasure.save(tmp_path / "e")
    pipe = backbone.pipeline()
    assert load_into(pipe, tmp_path / "e", ["Orla Vint", "cat"]) == ["Orla-Vint", "cat"]
    both, whole = draw(pipe), backbone.pipeline()
    load_into(whole, tmp_path / "e")
    assert abs(both - draw(whole)).max() < 1e-4
    with pytest.raises(UsageError, match="Did you mean 'cat'"):
        load_into(backbone.pipeline(), tmp_path / "e", ["catt"])


def test_every_layer_is_loaded_with_scale_one(backbone, erasure, tmp_path):
    erasure.save(tmp_path / "e")  # ranks differ from layer to layer, which is where a wrong alpha would show
    pipe = backbone.pipeline()
    load_into(pipe, tmp_path / "e", ["cat"])
    scales = {s for m in pipe.unet.modules() for s in getattr(m, "scaling", {}).values()}
    assert scales == {1.0}


def test_folders_may_be_strings(erasure, tmp_path):
    sha256 = erasure.save(str(tmp_path / "a"))
    assert digest(read_manifest(tmp_path / "a")["files"]) == sha256
    assert Erasure.load(str(tmp_path / "a")).folder == tmp_path / "a"


def test_reading_gives_back_what_was_saved(backbone, erasure, tmp_path):
    erasure.save(tmp_path / "e")
    again = Erasure.load(tmp_path / "e", backbone)
    base = dict(erasure.base) | {"modules": sorted(backbone.lora_targets("attention"))}
    assert replace(again, deltas={}) == replace(erasure, deltas={}, base=base, config={"rank": 2, "words": ["a", "b"]})
    assert [list(p) for p in again.deltas.values()] == [["refine", "adapter"], ["refine"]]
    for concept, parts in erasure.deltas.items():
        for part, deltas in parts.items():
            for name, delta in deltas.items():
                other = again.deltas[concept][part][name]
                assert torch.equal(other.up, delta.up)
                assert torch.equal(other.down, delta.down)


def test_same_deltas_same_bytes(erasure, tmp_path):
    first = erasure.save(tmp_path / "a")
    assert erasure.save(tmp_path / "b") == first
    one, two = (json.loads((tmp_path / d / "erasure.json").read_text()) for d in "ab")
    assert one["files"] == two["files"]
    assert one["erasure_sha256"] == first == digest(one["files"])
    assert replace(erasure, concepts=()).save(tmp_path / "c") == first


def test_saving_replaces_and_leaves_nothing_behind(erasure, tmp_path):
    erasure.save(tmp_path / "e")
    (tmp_path / "e" / "README.md").write_text("old")
    erasure.save(tmp_path / "e")
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    assert (tmp_path / "e" / "README.md").read_text() != "old"


def test_a_failed_save_keeps_the_old_one(erasure, tmp_path):
    erasure.save(tmp_path / "e")
    before = (tmp_path / "e" / "cat.safetensors").read_bytes()
    bad = replace(erasure, deltas={"cat": {"x": {"m": LowRank(torch.full((4, 1), torch.nan), torch.ones(1, 4))}}})
    with pytest.raises(ErasekitError, match="not finite"):
        bad.save(tmp_path / "e")
    with pytest.raises(ErasekitError, match="changes nothing"):
        replace(erasure, deltas={"cat": {"x": {}}}).save(tmp_path / "e")
    assert (tmp_path / "e" / "cat.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_place_that_cannot_be_written(erasure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem) as error:
        erasure.save(tmp_path / "file" / "e")
    wanted = f"Cannot write '{tmp_path / 'file' / 'e'}': File exists. Free disk space or choose another folder."
    assert str(error.value) == wanted


def test_what_a_manifest_cannot_hold_is_not_written(erasure, tmp_path):
    with pytest.raises(ErasekitError, match=r"^The erasure cannot be written: key 'method': "):
        replace(erasure, method="two\nlines").save(tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebodys_is_not_replaced(erasure, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="docs"):
        erasure.save(tmp_path / "docs")
    assert [p.name for p in (tmp_path / "docs").iterdir()] == ["thesis.txt"]


def test_writing_is_told(erasure, tmp_path):
    told = []
    with heard(told.append):
        erasure.save(tmp_path / "e")
    assert told == [Progressed("writing", 0, 1), Progressed("writing", 1, 1)]


def test_dense_and_overfull_deltas_are_factored(backbone, erasure, tmp_path):
    name = backbone.text_sites()[0].name
    weight = dict(backbone.denoiser.named_modules())[name].weight
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(weight.shape, generator=generator)
    over = LowRank(torch.randn(len(weight), 99, generator=generator), torch.randn(99, weight.shape[1], generator=generator))
    for delta, exact in ((Dense(dense), dense), (over, over.up @ over.down)):
        replace(erasure, deltas={"cat": {"x": {name: delta}}}).save(tmp_path / "e")
        read = Erasure.load(tmp_path / "e").deltas["cat"]["x"][name]
        assert read.rank <= min(weight.shape)
        assert norm(Dense(read.up @ read.down - exact)) < 1e-5 * exact.norm()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) - 8] if how == "truncated" else data)


@pytest.mark.parametrize("how", ["bit", "truncated", "missing"])
@pytest.mark.parametrize("file", ["all.safetensors", "cat.safetensors", "parts/cat.adapter.safetensors"])
def test_damaged_files_are_refused(erasure, tmp_path, file, how):
    erasure.save(tmp_path / "e")
    path = tmp_path / "e" / file
    path.unlink() if how == "missing" else damage(path, how)
    with pytest.raises(EnvironmentProblem, match=f"{file}' (is damaged|cannot be read)") as error:
        Erasure.load(tmp_path / "e")
    assert "\n" not in str(error.value)


def test_damage_is_found_before_a_pipeline_is_touched(backbone, erasure, tmp_path):
    erasure.save(tmp_path / "e")
    damage(tmp_path / "e" / "all.safetensors", "bit")
    pipe = backbone.pipeline()
    with pytest.raises(EnvironmentProblem, match="is damaged"):
        load_into(pipe, tmp_path / "e")
    assert not getattr(pipe.unet, "peft_config", {})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1', '{"schema_version": 1, "base": {}, "files": {}}'])
def test_a_damaged_manifest(erasure, tmp_path, text):
    erasure.save(tmp_path / "e")
    (tmp_path / "e" / "erasure.json").write_text(text)
    with pytest.raises(EnvironmentProblem, match="is damaged"):
        read_manifest(tmp_path / "e")


def test_a_changed_hash_in_the_manifest(erasure, tmp_path):
    erasure.save(tmp_path / "e")
    path = tmp_path / "e" / "erasure.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["all.safetensors"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(EnvironmentProblem, match="do not belong together"):
        read_manifest(tmp_path / "e")


def test_wrong_folder_newer_schema_and_wrong_base(backbone, erasure, tmp_path):
    with pytest.raises(UsageError, match=r"no erasure\.json"):
        Erasure.load(tmp_path)
    erasure.save(tmp_path / "e")
    other = tiny.load(tiny.save_pipeline(tmp_path / "other", seed=1))
    for read in (Erasure.load, read_manifest):
        with pytest.raises(UsageError, match=r"made for another base, sd .*--backbone tiny"):
            read(tmp_path / "e", other)
    with pytest.raises(UsageError, match="another base"):
        load_into(other.pipeline(), tmp_path / "e", base=other)
    path = tmp_path / "e" / "erasure.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(UsageError, match="newer erasekit"):
        Erasure.load(tmp_path / "e")


def test_a_pipeline_without_the_layers_is_refused(backbone, erasure, tmp_path):
    extra = {"no.such.layer": LowRank(torch.ones(4, 1), torch.ones(1, 4))}
    replace(erasure, deltas={"cat": {"x": erasure.deltas["cat"]["refine"] | extra}}).save(tmp_path / "e")
    with pytest.raises(ErasekitError, match="the module is not there"):
        load_into(backbone.pipeline(), tmp_path / "e")


def test_fused_projections_are_refused(backbone, erasure, tmp_path):
    erasure.save(tmp_path / "e")
    pipe = backbone.pipeline()
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(UsageError, match="unfuse_qkv_projections"):
        load_into(pipe, tmp_path / "e")


def test_no_paths_or_machine_names_in_any_file(erasure, tmp_path):
    erasure.save(tmp_path / "e")
    for path in (tmp_path / "e").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes()


def test_file_stems_are_plain_and_distinct():
    names = ["cat", "Orla Vint", "Orla/Vint", "all", "keys", "猫", "../up", "a.b"]
    stems = file_stems(names)
    assert stems["Orla Vint"] == "Orla-Vint"
    assert len(set(stems.values())) == len(names)
    assert "all" not in stems.values()
    assert all(s.replace("-", "").replace("_", "").isalnum() and s.isascii() for s in stems.values())
    torch.nn.ModuleDict({s: torch.nn.Identity() for s in stems.values()})  # what peft does with adapter names


def test_names_of_files_where_concepts_are_called_alike():
    assert list(file_stems(["all", "All", "ALL"]).values()) == ["all-2", "All-3", "ALL-4"]
    assert file_stems(["guidance", "猫", "-cat--", "x" * 300]) == {
        "guidance": "guidance-2",
        "猫": "concept",
        "-cat--": "cat",
        "x" * 300: "x" * 100,
    }


def test_the_manifest_can_be_read_by_eye_and_says_nothing_of_older_files(erasure, tmp_path):
    replace(erasure, concepts=(Concept.parse("猫"),)).save(tmp_path / "e")
    assert (tmp_path / "e" / "README.md").is_file()
    text = (tmp_path / "e" / "erasure.json").read_text("utf-8")
    assert "猫" in text
    older = {key: value for key, value in json.loads(text).items() if key not in ("rounding", "manifest_sha256")}
    write_manifest(tmp_path / "e", older)
    assert read_manifest(tmp_path / "e")["rounding"] == 0
    with pytest.raises(ValueError, match="changes nothing"):
        write_manifest(tmp_path / "e", older | {"parts": {}, "files": {"all.safetensors": older["files"]["all.safetensors"]}})
