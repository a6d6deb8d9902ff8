"""Nothing goes through the denoiser in more rows than the preset allows, and text is encoded before it is loaded."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from erasekit.backbones.memory import Activations, Holding
from erasekit.errors import ErasekitError
from erasekit.registration import plugins
from erasekit.runs.compute import compute
from erasekit.runs.config import build
from erasekit.runs.preflight import footprint
from erasekit.runs.resolve import resolve
from erasekit.runs.runner import run
from tests.conftest import THIRD_PARTY

REGISTRIES = plugins.load([THIRD_PARTY / "tiny_world.py"])
METHODS = [entry.name for entry in REGISTRIES.methods.entries() if entry.name != "pull"]
SHORT = {
    "trace": ["method.steps=2", "method.trajectories=4", "method.clean_trajectories=4"],
    "ant": ["method.steps=2", "method.trajectories=2", "method.saliency_draws=1", "method.fusion_points=8"],
    "eraseanything": ["method.steps=2", "method.images=2", "method.kept_images=3"],
    "advunlearn": ["method.steps=2", "method.plain_steps=1", "method.attack_steps=2", "method.trajectories=2"],
    "eraseflow": ["method.steps=2", "method.log_beta=10"],  # near the balance a loss is a small difference of large numbers
    "gem": ["method.steps=2"],
    "spm": ["method.steps=2", "method.warmup=0"],
    "stereo": ["method.steps=2", "method.images=2", "method.trajectories=2", "method.word_steps=2", "method.loops=1"],
    "esd": ["method.steps=2", "method.trajectories=2"],
    "mace": ["method.steps=2", "method.images=2", "method.kept_images=3"],
}
ATTACKING = ("advunlearn", "stereo")  # they have vectors read, for which the text encoders come back
ROWS = 2
SMALL = Holding(ROWS, encoders="released", checkpointing=False, slicing=True)
# Gradients of no row go into 8 GB, so that every batch is cut to one.
TIGHT = Activations(forward=0.0, kept=100.0, checkpointed=100.0, maps=0.0, decode=0.0)


@pytest.fixture(params=["tiny", "tiny-flux"])
def small(request, tiny_folder, tiny_flux_folder, monkeypatch):
    """A backbone of two rows at once whose encoders make room; its name and the settings that load it."""
    kind = REGISTRIES.backbones.get(request.param)
    folder = {"tiny": tiny_folder, "tiny-flux": tiny_flux_folder}[request.param]
    monkeypatch.setattr(kind, "holding", dict.fromkeys(kind.holding, SMALL))
    monkeypatch.setattr(kind, "_share_of", lambda self, x: 1.0)
    monkeypatch.setattr(kind, "activations", classmethod(lambda cls, size: TIGHT))
    settings = [f"backbone.path={folder}", "backbone.device=cpu", "backbone.dtype=float32", "backbone.vram=8"]
    return request.param, settings


def planned(small, method, *, concepts=("cat",), more=()):
    name, settings = small
    flags = {"method": method, "backbone": name, "task": "words", "concepts": concepts}
    return resolve(build(flags, overrides=[*settings, *SHORT.get(method, []), *more]), REGISTRIES)


def watched(denoiser):
    """How many rows each call had, without gradients (False) and with them (True)."""
    seen = {False: Counter(), True: Counter()}

    def hook(module, arguments, named):
        x = arguments[0] if arguments else named["hidden_states"]
        seen[torch.is_grad_enabled()][len(x)] += 1

    denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_no_call_has_more_rows_than_the_preset(small, method):
    plan = planned(small, method, concepts=("cat", "dog"))
    backbone = plan.backbone.load(plan.backbone_config)
    backbone.expect(lambda: plan.method(plan.method_config).texts(_context(plan, backbone)))
    seen = watched(backbone.denoiser)  # the encoders are gone: what `texts` leaves out cannot be encoded any more
    compute(plan, backbone, REGISTRIES)
    assert max(seen[False], default=0) <= ROWS
    trained = footprint(plan)
    assert max(seen[True], default=0) <= trained.rows
    if trained.rows:
        assert plan.method_config.batch == 1


def test_a_component_of_a_method_that_trains_nothing_itself_has_a_batch_that_fits_too(small):
    more = [f"components.blind.{key}=2" for key in ("words", "word_steps", "steps", "images", "scrambled")]
    plan = planned(small, "uce", more=["method.robustify=blind", *more])
    [component] = plan.components.values()
    assert (component.config.batch, component.config.accumulate) == (1, 4)
    backbone = plan.backbone.load(plan.backbone_config)
    backbone.expect(lambda: plan.method(plan.method_config).texts(_context(plan, backbone)))
    seen = watched(backbone.denoiser)
    compute(plan, backbone, REGISTRIES)
    assert max(seen[False]) <= ROWS
    assert max(seen[True]) == footprint(plan).rows == 2


def _context(plan, backbone):
    from erasekit.runs.compute import context

    return context(plan, backbone, REGISTRIES)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_a_preset_does_not_undo_the_fit(small, preset):
    method = "trace" if preset == "paper" else "mace"
    plan = planned(small, method)
    name, settings = small
    flags = {"method": method, "backbone": name, "task": "words", "concepts": ("cat",), "preset": preset}
    whole = resolve(build(flags, overrides=[s for s in settings if "vram" not in s]), REGISTRIES)
    cut = resolve(build(flags, overrides=settings), REGISTRIES)
    assert cut.method_config.batch == plan.method_config.batch == 1
    assert cut.method_config.accumulate == whole.method_config.batch * whole.method_config.accumulate


def test_chunks_change_nothing(small, tiny_folder, tiny_flux_folder):
    plan = planned(small, "uce")
    backbone = plan.backbone.load(plan.backbone_config)
    cond = backbone.encode(["a cat", "a dog", "a ship", "a photo", "the red thing"])
    x, tau = backbone.latents([0, 1, 2, 3, 4]), torch.linspace(0, 0.9, 5)
    seen = watched(backbone.denoiser)
    with torch.no_grad():
        cut = backbone.predict(x, tau, cond)
    whole = backbone.predict(x, tau, cond)
    assert seen == {False: Counter({2: 2, 1: 1}), True: Counter({5: 1})}
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


def test_a_late_prompt_is_an_error_in_one_line(small):
    plan = planned(small, "uce")
    backbone = plan.backbone.load(plan.backbone_config)
    backbone.expect(lambda: ["a dog"])
    known = backbone.encode(["a cat"])
    assert known.tokens.device.type == "cpu"
    backbone.denoiser  # noqa: B018
    assert torch.equal(backbone.encode(["a cat"]).tokens, known.tokens)
    backbone.encode(["a dog"])
    with pytest.raises(ErasekitError, match="'a ship' is to be encoded after the text encoders have made room") as error:
        backbone.encode(["a ship"])
    assert "\n" not in str(error.value)
    backbone.release("denoiser")
    assert len(backbone.encode(["a ship"])) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_loads_the_denoiser_once_and_needs_no_encoder_after_it(small, method, tmp_path, monkeypatch):
    plan, loaded = planned(small, method), []
    original = plan.backbone._load
    monkeypatch.setattr(plan.backbone, "_load", lambda self, name: loaded.append(name) or original(self, name))
    result = run(plan.config, out=tmp_path, registries=REGISTRIES)
    assert result.counts["failed"] == 0
    assert loaded.count(plan.backbone.prefix) == 1
    assert loaded.index(plan.backbone.prefix) > max(loaded.index(name) for name in plan.backbone.encoders)
    assert loaded.count("vae") == 1
    assert method in ATTACKING or all(loaded.count(name) == 1 for name in plan.backbone.encoders)


def test_a_denoiser_that_was_changed_is_loaded_again(small):
    plan = planned(small, "uce")
    backbone = plan.backbone.load(plan.backbone_config)
    assert backbone.unchanged()
    weight = next(backbone.denoiser.parameters())
    assert backbone.unchanged()
    with torch.no_grad():
        weight.flatten()[0] += 1
    assert not backbone.unchanged()
