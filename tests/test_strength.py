"""How strongly an erasure acts, several of them together, and what is measured of both."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from PIL import Image

from erasekit.cli import main
from erasekit.concepts import Concept
from erasekit.erasures.deltas import merged, scale, summed
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into as load_with
from erasekit.erasures.loading import unload
from erasekit.erasures.manifest import read_manifest
from erasekit.errors import UsageError
from erasekit.evaluation.curves import Interference, Strength
from erasekit.evaluation.results import read_result
from erasekit.methods.context import RunContext
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.interference import interference
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import planned, run
from erasekit.runs.strengths import measure_strength
from erasekit.runs.together import merge
from erasekit.testing import tiny, tiny_flux
from erasekit_negative_prompt.method import NegativePrompt, NegativePromptConfig
from erasekit_sld.method import MEDIUM, Sld, SldConfig
from tests.test_export import random_deltas, shapes_of

load_into = partial(load_with, component=plugins.default().components.get)
SCOPE = r"attn\.|attn2|context_embedder"


@pytest.fixture(scope="module")
def erasures(backbone, tmp_path_factory):
    """Folders of an erasure of two concepts and of one of a third, with different deltas each."""
    folder, shapes = tmp_path_factory.mktemp("erasures"), shapes_of(backbone.denoiser, SCOPE)
    concepts = {name: random_deltas(shapes, seed, size=0.1) for seed, name in enumerate(("cat", "dog", "ship"))}
    for name, which in (("two", ("cat", "dog")), ("one", ("ship",))):
        deltas = {concept: {"adapter": concepts[concept]} for concept in which}
        Erasure.of(backbone, [Concept.parse(c) for c in which], method="made-up", config={}, deltas=deltas).save(folder / name)
    return folder / "two", folder / "one", concepts


def acts_as(backbone, pipe, deltas):
    """How far the pipeline's denoiser is from the base with these deltas merged, as the difference of predictions."""
    x, cond = backbone.latents([1, 2], 16), backbone.encode(["a cat", "a dog"])
    tau, own = torch.tensor([0.2, 0.9]), backbone.denoiser
    with torch.no_grad(), merged(own, deltas):
        wanted = backbone.predict(x, tau, cond)
    backbone._parts[backbone.prefix] = getattr(pipe, backbone.prefix)
    try:
        with torch.no_grad():
            return float((backbone.predict(x, tau, cond) - wanted).abs().max())
    finally:
        backbone._parts[backbone.prefix] = own


def test_a_strength_scales_the_deltas(backbone, erasures):
    two, _, concepts = erasures
    total = summed([concepts["cat"], concepts["dog"]])
    for strength in (0.0, 0.5, 1.5):
        pipe = backbone.pipeline()
        assert load_into(pipe, two, strength=strength) == ["all"]
        assert acts_as(backbone, pipe, scale(total, strength)) < 1e-4
    assert acts_as(backbone, backbone.pipeline(), total) > 1e-2


def test_each_concept_has_a_strength_of_its_own(backbone, erasures):
    two, _, concepts = erasures
    pipe = backbone.pipeline()
    assert load_into(pipe, two, strength={"cat": 0.5}) == ["cat", "dog"]
    assert acts_as(backbone, pipe, summed([scale(concepts["cat"], 0.5), concepts["dog"]])) < 1e-4
    pipe.set_adapters(["cat", "dog"], [1.0, 0.0])  # and toggles as any adapter does
    assert acts_as(backbone, pipe, concepts["cat"]) < 1e-4
    with pytest.raises(UsageError, match="Did you mean 'cat'"):
        load_into(backbone.pipeline(), two, strength={"cta": 0.5})


def test_erasures_of_different_runs_act_together_and_stay_as_strong_as_they_were(backbone, erasures):
    two, one, concepts = erasures
    pipe = backbone.pipeline()
    load_into(pipe, two, strength=0.5)
    assert load_into(pipe, one) == ["all-2"]
    halves = [scale(concepts[name], 0.5) for name in ("cat", "dog")]
    assert acts_as(backbone, pipe, summed([*halves, concepts["ship"]])) < 1e-4
    pipe.set_adapters(["all-2"])
    load_into(pipe, two, ["dog"])
    assert acts_as(backbone, pipe, summed([concepts["ship"], concepts["dog"]])) < 1e-4
    unload(pipe)
    assert acts_as(backbone, pipe, {}) == 0


@pytest.mark.parametrize("kind", ["sd", "flux", "flux-cfg"])
@pytest.mark.parametrize(("method", "config"), [(NegativePrompt, NegativePromptConfig()), (Sld, SldConfig(**MEDIUM))])
def test_guidance_has_a_strength_too(kind, method, config, tiny_folder, tiny_flux_folder, tmp_path):
    """0 is the base bit by bit, 1 the erasure, and between them the first step is between them."""
    if kind == "sd":
        steered = tiny.load(tiny_folder)
    else:
        steered = tiny_flux.load(tiny_flux_folder, guidance="embedded" if kind == "flux" else "cfg")
    ctx = RunContext(backbone=steered, concepts=(Concept.parse("cat"),), task=None)
    method(config).erase(ctx).save(tmp_path / "e")

    def draw(strength=None):
        pipe = steered.pipeline()
        if strength is not None:
            load_into(pipe, tmp_path / "e", strength=strength, base=steered)
        call = steered.call_arguments(steered.encode(["a photo of a cat"]), empty=steered.encode([""]), guidance=3.0)
        call |= {"height": 16, "width": 16, "num_inference_steps": 1, "generator": [torch.Generator().manual_seed(1)]}
        return pipe(**call, output_type="latent").images.double()

    base, half, whole = draw(), draw(0.5), draw(1)
    assert torch.equal(draw(0.0), base)
    torch.testing.assert_close(half, (base + whole) / 2, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="give one number"):
        draw({"cat": 0.5})


@pytest.fixture(scope="module")
def registries(world):
    return plugins.load([world])


@pytest.fixture(scope="module")
def configured(tiny_folder):
    def config(concept, **flags):
        overrides = [f"backbone.path={tiny_folder}", "backbone.device=cpu", "method.steps=3"]
        return build(
            {"method": "pull", "backbone": "tiny", "task": "words", "concepts": (concept,), **flags}, overrides=overrides
        )

    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, registries, configured):
    """Directories of a run for each of two words."""
    out = tmp_path_factory.mktemp("runs")
    for concept in ("cat", "dog"):
        run(configured(concept), out=out, registries=registries)
    return [path_of(out, resolve(configured(concept), registries)) for concept in ("cat", "dog")]


def test_the_curve_begins_at_the_base_and_goes_through_the_run(runs, registries):
    directory, result = runs[0], read_result(runs[0] / "results.json")
    measured = measure_strength(directory, (0.0, 0.5, 1.0, 1.5), limit=None, registries=registries)
    assert Strength.read(directory / "strength.json") == measured
    (curve,) = (curve for curve in measured.curves if curve.metric == "acc_e")
    values = {point.strength: point.value for point in curve.points}
    assert list(values) == [0.0, 0.5, 1.0, 1.5]
    assert values[0.0] == result.metrics["acc_e"].base
    assert values[1.0] == result.metrics["acc_e"].value
    assert curve.points[0].n == result.metrics["acc_e"].n
    drawn = {path: path.stat().st_mtime_ns for path in directory.glob("images/strength-*/*.png")}
    assert {path.parent.name for path in drawn} == {"strength-0.5", "strength-1", "strength-1.5"}
    again = measure_strength(directory, (0.5,), limit=None, registries=registries)
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    assert [point.strength for point in again.curves[0].points] == [0.5]


def test_the_command_writes_the_curve(runs, world, capsys):
    assert main(["strength", str(runs[1]), "--at", "0", "--at", "1", "--limit", "1", "--plugin", str(world), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["concepts"] == ["dog"]
    assert main(["strength", str(runs[1].parent), "--plugin", str(world)]) == 2
    assert "finished run" in capsys.readouterr().err


def test_merged_erasures_are_their_sum_and_know_what_each_left_alone(runs, registries, tiny_folder, tmp_path):
    folders = [directory / "erasure" for directory in runs]
    found = merge(folders, backbone={"path": str(tiny_folder), "device": "cpu"}, task="words", registries=registries)
    found.erasure.save(tmp_path / "both")
    manifest, loaded = read_manifest(tmp_path / "both"), Erasure.load(tmp_path / "both", tiny.load(tiny_folder))
    assert [c.name for c in loaded.concepts] == ["cat", "dog"]
    assert set(manifest["residual"]) == {"cat", "dog"}
    assert [list(alone["residual"]) for alone in manifest["figures"]["alone"]] == [["cat"], ["dog"]]
    assert [of["method"] for of in manifest["config"]["of"]] == ["pull", "pull"]
    parts = [Erasure.load(folder).total() for folder in folders]
    for name, delta in loaded.total().items():
        expected = sum(part[name].up @ part[name].down for part in parts)
        assert torch.allclose(delta.up @ delta.down, expected, atol=1e-6)


def test_what_was_put_together_is_measured_though_nobody_registered_its_method(
    runs, registries, configured, tiny_folder, tmp_path
):
    backbone = {"path": str(tiny_folder), "device": "cpu"}
    folders = [directory / "erasure" for directory in runs]
    found = merge(folders, backbone=backbone, measure=False, registries=registries)
    assert found.alone == ()
    found.erasure.save(tmp_path / "both")
    config = configured("cat", method="merged", concepts=("cat", "dog"))
    config = config.model_copy(update={"options": config.options.model_copy(update={"method": {"of": []}})})
    result = run(config, out=tmp_path / "runs", registries=registries, erasure=tmp_path / "both")
    assert result.method == "merged"
    assert result.concepts == ("cat", "dog")
    with pytest.raises(UsageError, match="Unknown method 'merged'"):
        planned(config, registries)


def test_interference_has_a_row_for_each_and_a_column_for_each_thing(runs, registries, tiny_folder, tmp_path, configured):
    backbone = {"path": str(tiny_folder), "device": "cpu"}
    folders = [directory / "erasure" for directory in runs]
    erasure = merge(folders, backbone=backbone, measure=False, registries=registries).erasure
    erasure.save(tmp_path / "both")
    found = interference([*folders, tmp_path / "both"], 1, task="words", backbone=backbone, registries=registries)
    assert found.erased == ("cat", "dog", "cat, dog")
    assert found.asked == ("cat", "dog", "ship")
    assert Interference.model_validate(found.model_dump(mode="json")) == found


def test_what_cannot_be_put_together_is_said(backbone, erasures, runs, registries, tmp_path):
    two, one, _ = erasures
    with pytest.raises(UsageError, match="'cat' is erased by two"):
        merge([two, two], registries=registries)
    with pytest.raises(UsageError, match="two folders or more"):
        merge([one], registries=registries)
    ctx = RunContext(backbone=backbone, concepts=(Concept.parse("ship"),), task=None)
    NegativePrompt(NegativePromptConfig()).erase(ctx).save(tmp_path / "steered")
    with pytest.raises(UsageError, match="changes no weights"):
        merge([two, tmp_path / "steered"], registries=registries)
    if backbone.prefix == "transformer":
        with pytest.raises(UsageError, match="of one base"):
            merge([one, runs[0] / "erasure"], registries=registries)


def test_generate_takes_a_strength(runs, world, tiny_folder, tmp_path, capsys):
    base = ["generate", "a cat", "-b", "tiny", "--plugin", str(world), "-s", f"backbone.path={tiny_folder}"]
    base += ["-s", "protocol.steps=2", "-s", "protocol.size=16"]
    erased = [*base, "--erasure", str(runs[0] / "erasure")]
    drawn = {"base": base, "none": [*erased, "--strength", "0"], "cat": [*erased, "--strength", "cat=1.5"]}
    for name, arguments in drawn.items():
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    files = {name: Image.open(next((tmp_path / name).glob("*.png"))).tobytes() for name in drawn}
    assert files["base"] == files["none"] != files["cat"]
    capsys.readouterr()
    for wrong in (["--strength", "much"], ["--strength", "dog=1"]):
        assert main([*erased, *wrong, "--out", str(tmp_path / "x")]) == 2
    assert main([*base, "--strength", "0.5", "--out", str(tmp_path / "x")]) == 2
    assert "--erasure FOLDER" in capsys.readouterr().err
