"""An erasure that a stranger hands over: whatever was done to it, it is refused in one line or loads the honest weights."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from erasekit.concepts import Concept
from erasekit.erasures.contents import check_replaceable, copy_erasure
from erasekit.erasures.deltas import LowRank
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into
from erasekit.erasures.manifest import digest, read_manifest, seal
from erasekit.erasures.modelcard import load_lines, model_card
from erasekit.errors import EnvironmentProblem, ErasekitError, UsageError
from erasekit.methods.context import RunContext
from erasekit.registration.plugins import default
from erasekit.testing import tiny
from erasekit_sld.method import MAX, Sld, SldConfig


@pytest.fixture(scope="module")
def backbone(tiny_folder):
    return tiny.load(tiny_folder)


@pytest.fixture(scope="module")
def honest(backbone, tmp_path_factory):
    """An erasure of two concepts, one of them in two parts."""
    generator, modules = torch.Generator().manual_seed(0), dict(backbone.denoiser.named_modules())

    def deltas(rank):
        def random(*shape):
            return 0.1 * torch.randn(shape, generator=generator)

        shapes = {name: modules[name].weight.shape for name in backbone.lora_targets("kv")[:2]}
        return {name: LowRank(random(out, rank), random(rank, width)) for name, (out, width) in shapes.items()}

    concepts = (Concept.parse("cat:kitten"), Concept.parse("dog"))
    both = {"cat": {"refine": deltas(1), "adapter": deltas(2)}, "dog": {"refine": deltas(1)}}
    folder = tmp_path_factory.mktemp("honest") / "e"
    Erasure.of(backbone, concepts, method="made-up", config={"rank": 2}, deltas=both).save(folder)
    return folder


@pytest.fixture(scope="module")
def steering(backbone, tmp_path_factory):
    """An erasure without weights."""
    folder = tmp_path_factory.mktemp("steering") / "e"
    ctx = RunContext(backbone=backbone, concepts=(Concept.parse("cat:kitten"),), task=None)
    Sld(SldConfig(**MAX)).erase(ctx).save(folder)
    return folder


@pytest.fixture
def folder(honest, tmp_path):
    return Path(shutil.copytree(honest, tmp_path / "e"))


def rewrite(folder, change):
    """Let `change` edit the manifest, and make all hashes right again, as somebody would who means harm."""
    path = folder / "erasure.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        manifest["files"][name] = sha256(folder / name) if (folder / name).is_file() else manifest["files"][name]
    change(manifest)
    manifest["erasure_sha256"] = digest(manifest["files"])
    manifest["manifest_sha256"] = seal(manifest)
    path.write_text(json.dumps(manifest))


def sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(path, change=lambda tensors: None, header=lambda config: None):
    """Rewrite a tensor file with other tensors or another head."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    change(tensors)
    extra = header(config) or {}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)} | extra)


def refused(folder, backbone, says, kind=EnvironmentProblem):
    """Nobody takes it: not who verifies it, and not who loads it into a pipeline."""
    for read in (lambda: Erasure.load(folder, backbone), lambda: load_into(backbone.pipeline(), folder, base=backbone)):
        with pytest.raises(kind, match=says) as error:
            read()
        assert "\n" not in str(error.value)


def test_the_honest_one_is_taken(honest, steering, backbone):
    assert list(Erasure.load(honest, backbone).deltas) == ["cat", "dog"]
    assert load_into(backbone.pipeline(), honest, base=backbone) == ["all"]
    assert Erasure.load(steering, backbone).guidance.texts == ("", "cat, kitten")


def test_all_has_to_be_the_sum_of_the_parts(folder, backbone):
    """The certificate reads the parts, a pipeline loads `all`."""
    edit(folder / "all.safetensors", lambda tensors: [t.mul_(0.5) for t in tensors.values()])
    rewrite(folder, lambda manifest: None)
    refused(folder, backbone, r"all\.safetensors' is not the sum of cat\.safetensors, dog\.safetensors")


def test_a_concept_has_to_be_the_sum_of_its_parts(folder, backbone):
    edit(folder / "parts" / "cat.adapter.safetensors", lambda tensors: [t.mul_(1.1) for t in tensors.values()])
    rewrite(folder, lambda manifest: None)
    refused(folder, backbone, r"cat\.safetensors' is not the sum of")


def first(key, value):
    def change(tensors):
        name = next(k for k in tensors if key in k)
        tensors[name] = value(tensors[name])

    return change


def put(**values):
    return lambda config: config.update({f"unet.{k}": v for k, v in values.items()})


@pytest.mark.parametrize(
    ("change", "header", "says"),
    [
        (None, put(lora_alpha=30), "load them at another scale"),
        (None, put(r=9), "load them at another scale"),
        (None, put(alpha_pattern={"^x": 1}), "load them at another scale"),
        (None, put(rank_pattern={"^x": 3}, alpha_pattern={"^x": 3}), "load them at another scale"),
        (None, put(target_modules=["to_q"]), "load them at another scale"),
        (None, put(target_modules=None), "no settings of a LoRA"),
        (None, put(use_dora=True), "load them at another scale"),
        (None, lambda config: config.clear(), "no settings of a LoRA"),
        (None, lambda config: {"format": "pt"}, "load them at another scale"),
        (first("lora_A", lambda t: t * float("nan")), None, "not finite"),
        (first("lora_B", lambda t: t + float("inf")), None, "not finite"),
        (first("lora_A", lambda t: t.half()), None, "not torch.float32"),
        (first("lora_A", lambda t: t.to(torch.int32)), None, "not torch.float32"),
        (first("lora_A", lambda t: t[None]), None, "do not belong together"),
        (first("lora_A", lambda t: t[:0]), None, "do not belong together"),
        (first("lora_A", lambda t: torch.cat([t, t])), None, "do not belong together"),
        (lambda tensors: tensors.pop(next(iter(tensors))), None, "do not belong together"),
        (lambda tensors: tensors.update({"text_encoder.x.lora_A.weight": torch.ones(1, 4)}), None, "something else"),
        (lambda tensors: tensors.update({"unet.alpha": torch.ones(1)}), None, "something else"),
        (lambda tensors: tensors.clear(), None, "something else than LoRA weights of the denoiser, or nothing"),
    ],
)
def test_a_file_holds_nothing_but_what_is_written(folder, backbone, change, header, says):
    edit(folder / "all.safetensors", change or (lambda tensors: None), header or (lambda config: None))
    rewrite(folder, lambda manifest: None)
    refused(folder, backbone, says)


def test_every_tensor_has_the_shape_of_its_layer(folder, backbone):
    for name in json.loads((folder / "erasure.json").read_text())["files"]:
        edit(folder / name, lambda tensors: tensors.update({k: t.repeat(1, 2) for k, t in tensors.items() if "lora_A" in k}))
    rewrite(folder, lambda manifest: None)
    refused(folder, backbone, r"which is \(\d+, \d+\) in the base")
    with pytest.raises(ErasekitError, match="the module is"):
        load_into(backbone.pipeline(), folder)


def test_a_rank_may_not_be_larger_than_its_layer(folder, backbone):
    for name in json.loads((folder / "erasure.json").read_text())["files"]:
        edit(
            folder / name,
            lambda ts: ts.update({k: torch.zeros((99, t.shape[1]) if "_A" in k else (len(t), 99)) for k, t in ts.items()}),
            put(r=99, lora_alpha=99, rank_pattern={}, alpha_pattern={}),
        )
    rewrite(folder, lambda manifest: manifest.update(ranks=dict.fromkeys(manifest["ranks"], 99)))
    refused(folder, backbone, "a larger rank than its layer")


def drop(*path):
    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return change


def assign(value, *path):
    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("files", "parts/cat.adapter.safetensors"), "'files' is not the list"),
        (assign({}, "files"), "'files' is not the list"),
        (assign([], "base", "modules"), "key 'base.modules'"),
        (assign(["down_blocks"], "base", "modules"), "changes other layers|made for another base"),
        (assign({}, "parts"), "'files' is not the list"),
        (assign("guidance", "kind"), "'files' is not the list"),
        (assign("text_encoder", "denoiser"), "key 'denoiser'"),
        (assign("__class__", "denoiser"), "key 'denoiser'"),
        (assign(99, "ranks", "all.safetensors"), "another rank"),
        (assign("float16", "dtype"), "not torch.float16"),
        (assign("int8", "dtype"), "key 'dtype'"),
        (assign("../../x.safetensors", "parts", "dog", "refine"), r"key 'parts\.dog\.refine'"),
        (assign("/etc/x.safetensors", "parts", "dog", "refine"), r"key 'parts\.dog\.refine'"),
        (assign("parts/../x.safetensors", "parts", "dog", "refine"), r"key 'parts\.dog\.refine'"),
        (assign("dog.bin", "parts", "dog", "refine"), r"key 'parts\.dog\.refine'"),
        (assign("0" * 64, "files", "../x.safetensors"), "key 'files"),
        (assign("x", "surprise"), "key 'surprise'"),
        (assign("x\ny", "base", "repo"), "invisible character U\\+000A"),
        (assign("x\x1b[2J", "method"), "key 'method'"),
        (assign("a\u202eb", "base", "repo"), "invisible character U\\+202E"),
        (assign(True, "schema_version"), "schema_version"),
        (assign("1", "schema_version"), "schema_version"),
        (assign(0, "schema_version"), "schema_version"),
        (assign(1e999, "drift"), "Infinity is no number"),
        (assign(["{0.__class__}"], "concepts", 0, "templates"), "one '{}' and no other braces"),
        (assign(["{:>999999999}"], "concepts", 0, "templates"), "one '{}' and no other braces"),
        (assign([], "concepts", 0, "phrases"), "key 'concepts.0.phrases'"),
    ],
)
def test_a_manifest_is_held_against_its_schema(folder, backbone, change, says):
    rewrite(folder, change)
    refused(folder, backbone, says, kind=ErasekitError)


def test_what_a_manifest_says_is_sealed(folder, backbone):
    """Also what no weight hangs on: its warnings, and what is left of the concept."""
    path = folder / "erasure.json"
    path.write_text(path.read_text().replace('"made-up"', '"trace"'))
    refused(folder, backbone, "key 'manifest_sha256'|'manifest_sha256'")


def test_a_key_twice_is_refused(folder, backbone):
    path = folder / "erasure.json"
    path.write_text(path.read_text().replace('"kind"', '"kind": "guidance",\n "kind"', 1))
    refused(folder, backbone, "key 'kind' is there twice")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "nan", '"x"', "1" * 5000])
def test_json_that_is_none_or_absurd(folder, backbone, text):
    (folder / "erasure.json").write_text(text)
    refused(folder, backbone, "is damaged")


def test_words_that_no_prompt_may_hold(folder, backbone):
    rewrite(folder, assign(["nsfw picture of a child"], "concepts", 0, "phrases"))
    refused(folder, backbone, "pairs minors", kind=UsageError)


@pytest.mark.parametrize("name", ["dog.safetensors", "erasure.json", "parts/cat.adapter.safetensors", "README.md"])
def test_links_are_refused_before_they_are_followed(folder, backbone, name):
    kept = folder.parent / "elsewhere"
    if (folder / name).exists():
        (folder / name).rename(kept)
    else:
        kept.write_text("")
    (folder / name).symlink_to(kept)
    refused(folder, backbone, "is a symbolic link; only plain files are read")


def test_a_folder_of_parts_that_is_a_link(folder, backbone):
    (folder / "parts").rename(folder.parent / "parts")
    (folder / "parts").symlink_to(folder.parent / "parts")
    refused(folder, backbone, "is a symbolic link")


@pytest.mark.parametrize("name", ["dog.safetensors", "erasure.json"])
def test_a_fifo_is_refused_and_does_not_hang(folder, backbone, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, backbone, "is a FIFO")


def test_a_socket_and_a_folder_in_the_place_of_a_file(folder, backbone, monkeypatch):
    monkeypatch.chdir(folder)
    os.unlink("dog.safetensors")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("dog.safetensors")
        refused(folder, backbone, "is a socket")
    os.unlink("dog.safetensors")
    os.mkdir("dog.safetensors")
    refused(folder, backbone, "is a folder")


def test_sizes_are_bounded(folder, backbone):
    os.truncate(folder / "erasure.json", 2**40)  # sparse: it takes no room
    refused(folder, backbone, "has 1099511627776 bytes; such a file has at most")


@pytest.mark.parametrize("name", ["extra.safetensors", "parts/x.safetensors", "model.bin", "guidance.json", "x.py"])
def test_what_is_not_listed_is_refused(folder, backbone, name):
    (folder / name).write_bytes(b"x")
    refused(folder, backbone, "is no part of the erasure")


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "sample.png", ".gitattributes"])
def test_cards_licences_and_images_may_lie_beside(folder, backbone, name):
    (folder / name).write_bytes(b"x")
    assert Erasure.load(folder, backbone).kind == "weights"


def test_a_copy_holds_what_was_checked_and_follows_no_link(folder, tmp_path):
    (folder / ".hidden").symlink_to("/etc")
    (folder / "note.txt").symlink_to("/etc/hostname")
    copy_erasure(folder, tmp_path / "copy", read_manifest(folder))
    listed = {*json.loads((folder / "erasure.json").read_text())["files"], "erasure.json"}
    assert {p.relative_to(tmp_path / "copy").as_posix() for p in (tmp_path / "copy").rglob("*") if p.is_file()} == listed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scale": "x"}, "key 'scale'"),
        ({"scheme": 5}, "key 'scheme'"),
        ({"schema_version": 2}, "key 'schema_version'"),
        ({"texts": ["", "a\nb"]}, "key 'texts"),
        ({"texts": [""]}, "key 'texts"),
        ({"more": 1}, "key 'more'"),
    ],
)
def test_guidance_is_held_against_its_schema(steering, backbone, tmp_path, change, says):
    folder = shutil.copytree(steering, tmp_path / "e")
    path = folder / "guidance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    rewrite(folder, lambda manifest: None)
    with pytest.raises(EnvironmentProblem, match=says):
        Erasure.load(folder, backbone)


def test_guidance_settings_that_its_scheme_does_not_take(steering, backbone, tmp_path):
    folder = shutil.copytree(steering, tmp_path / "e")
    path = folder / "guidance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {"safety_scale": -1}}))
    rewrite(folder, lambda manifest: None)
    with pytest.raises(EnvironmentProblem, match="'sld' does not take its settings"):
        load_into(backbone.pipeline(), folder, base=backbone, component=default().components.get)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update(tokens=tensors["tokens"] * float("nan")),
        lambda tensors: tensors.update(tokens=tensors["tokens"][:1].clone()),
        lambda tensors: tensors.update(ids=tensors["ids"].float()),
        lambda tensors: tensors.update(ids=tensors["ids"][:, :3].clone()),
        lambda tensors: tensors.pop("lengths"),
        lambda tensors: tensors.update(more=torch.ones(2)),
    ],
)
def test_encoded_prompts_are_checked(steering, backbone, tmp_path, change):
    folder = shutil.copytree(steering, tmp_path / "e")
    with safe_open(folder / "guidance.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, folder / "guidance.safetensors")
    rewrite(folder, lambda manifest: None)
    with pytest.raises(EnvironmentProblem, match=r"guidance\.safetensors' is damaged"):
        Erasure.load(folder, backbone)


def test_a_name_never_becomes_code(folder):
    """What the report and the card print can be run as it stands."""
    record = read_manifest(folder)
    for repo in ('x"\nimport os', 'x"); print("mine', "a\\", "owner/na'me"):
        lines = load_lines(record | {"base": record["base"] | {"repo": repo}}, 'er"asure')
        nodes = list(ast.walk(ast.parse(lines)))
        imported = {n.module for n in nodes if isinstance(n, ast.ImportFrom)} | {n for n in nodes if isinstance(n, ast.Import)}
        called = {ast.unparse(n.func).rpartition(".")[2] for n in nodes if isinstance(n, ast.Call)}
        assert imported == {"diffusers"}
        assert called == {"from_pretrained", "load_lora_weights", "pipe", "save"}
        assert repo in {n.value for n in nodes if isinstance(n, ast.Constant)}
        model_card(record | {"base": record["base"] | {"repo": repo}})


@pytest.mark.parametrize(
    "content", [["notes.txt"], ["erasure.json", "notes.txt"], ["sub/erasure.json"], ["erasure.json", "sub/x.safetensors"]]
)
def test_force_replaces_nothing_but_an_erasure(tmp_path, content):
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="It is not touched") as error:
        check_replaceable(tmp_path)
    assert any(name.split("/")[0] in str(error.value) for name in content)


def test_force_replaces_an_erasure_an_empty_folder_and_nothing(folder, tmp_path):
    check_replaceable(folder)
    check_replaceable(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    check_replaceable(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(UsageError, match="is no folder"):
            check_replaceable(tmp_path / name)


def places(value, path=()):
    """Every key and index in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=30),
    st.sampled_from(
        ["../x", "/etc/passwd", "\x00", "a\nb", "{}", "{0}", "unet", "guidance", "all.safetensors", "0" * 64, "\ud800"]
    ),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def tampered(folder, data):
    """Flip, cut, retype, rename or add something; whether hashes were made right again afterwards."""
    manifest = json.loads((folder / "erasure.json").read_text())
    files = [*manifest["files"], "erasure.json"]
    how = data.draw(st.sampled_from(["flip", "cut", "grow", "retype", "rename", "drop", "swap", "remove"]), label="how")
    if how in ("flip", "cut", "grow", "remove"):
        path = folder / data.draw(st.sampled_from(files), label="file")
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1), label="at")
        if how == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        path.unlink() if how == "remove" else path.write_bytes({"cut": content[:at], "grow": content + b"x"}.get(how, content))
        return False
    if how == "swap":
        one, other = data.draw(st.permutations(list(manifest["files"])), label="files")[:2]
        content = (folder / one).read_bytes()
        (folder / one).write_bytes((folder / other).read_bytes())
        (folder / other).write_bytes(content)
        again = True
    else:
        *path, key = data.draw(st.sampled_from(list(places(manifest))), label="place")
        place = manifest
        for step in path:
            place = place[step]
        if how == "retype":
            place[key] = data.draw(STRANGE, label="value")
        elif how == "rename" and isinstance(place, dict):
            place[data.draw(st.text(max_size=12), label="name")] = place.pop(key)
        else:
            del place[key]
        again = data.draw(st.booleans(), label="hashes made right")
        (folder / "erasure.json").write_text(json.dumps(manifest))
    if again:
        try:
            rewrite(folder, lambda manifest: None)
        except (KeyError, TypeError, AttributeError, OSError, ValueError):
            return False
    return again


@pytest.mark.parametrize("which", ["honest", "steering"])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_done_to_an_erasure(request, which, backbone, tmp_path_factory, data):
    """Refused in one line; or its weights are the honest ones; never anything else, and never another error."""
    original = request.getfixturevalue(which)
    folder = shutil.copytree(original, tmp_path_factory.mktemp("fuzz") / "e")
    wanted = Erasure.load(original)
    tampered(folder, data)
    found, refusal = None, ""
    try:
        found = Erasure.load(folder, backbone)
    except ErasekitError as error:
        refusal = str(error)
    shutil.rmtree(folder.parent)
    if found is None:
        assert refusal
        assert "\n" not in refusal
        return
    assert found.kind == wanted.kind
    if found.guidance:
        assert all(
            torch.equal(a, b)
            for a, b in zip(*(vars(e.guidance.prompts).values() for e in (found, wanted)), strict=True)
            if a is not None
        )
        return
    total, honest = found.total(), wanted.total()
    assert total.keys() == honest.keys()
    for name, delta in total.items():
        torch.testing.assert_close(delta.up @ delta.down, honest[name].up @ honest[name].down)
