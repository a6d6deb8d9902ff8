"""Settings of components: laid over one another like a method's, checked, part of a run's name, and counted in its memory."""

import pytest
import torch

from erasekit.backbones.memory import GIB
from erasekit.erasures.deltas import to_dense
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.registration import plugins
from erasekit.runs.compute import compute, context
from erasekit.runs.config import build, to_toml
from erasekit.runs.preflight import erase_rows, footprint, preflight
from erasekit.runs.resolve import resolve
from erasekit_stereo.blind import Blind, BlindConfig
from tests.conftest import THIRD_PARTY

REGISTRIES = plugins.default()
STAGE = "method.robustify=blind"


def planned(*overrides, method="uce", backbone="sd15-mini", **flags):
    flags = {"method": method, "backbone": backbone, "concepts": ("cat",), **flags}
    return resolve(build(flags, overrides=["backbone.device=cpu", *overrides]), REGISTRIES)


def test_a_component_has_its_backbones_settings_and_the_users_over_them():
    plan = planned(STAGE, "components.blind.steps=7")
    stage = context(plan, None, REGISTRIES).component("robustify", "blind")
    assert isinstance(stage, Blind)
    assert (stage.config.steps, stage.config.batch) == (7, 16)
    assert stage.config.rank == BlindConfig().rank
    assert planned(STAGE, backbone="flux").components["robustify", "blind"].config == BlindConfig()
    assert planned(STAGE, backbone="sd15").components["robustify", "blind"].config.gone == 0.25


def test_settings_of_components_are_read_back_from_a_file(tmp_path):
    plan = planned(STAGE, "components.blind.steps=7")
    (tmp_path / "run.toml").write_text(to_toml(plan.config))
    again = resolve(build({}, file=tmp_path / "run.toml"), REGISTRIES)
    assert again.hash == plan.hash
    assert again.components["robustify", "blind"].config.steps == 7


def test_other_settings_of_a_component_are_another_run_and_the_usual_ones_are_not():
    usual, said, other = (
        planned(STAGE, *more) for more in ((), ("components.blind.steps=120",), ("components.blind.steps=7",))
    )
    assert usual.hash == said.hash
    assert usual.erasing == said.erasing
    assert len({usual.hash, other.hash}) == len({usual.erasing, other.erasing}) == 2


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([STAGE, "components.blind.step=7"], r"Unknown setting 'components\.blind\.step'.*components\.blind\.steps"),
        ([STAGE, "components.blind.until=3"], r"components\.blind\.until"),
        (["components.blind.steps=7"], "There are settings for the component 'blind', which is not chosen."),
        (["method.robustify=rece", "components.rece.rounds=7"], "settings for the component 'rece', which has no settings."),
        (["method.robustify=blnd", "components.blnd.rounds=7"], "Unknown choice for 'robustify' 'blnd'"),
    ],
)
def test_a_wrong_setting_is_one_line(overrides, line):
    with pytest.raises(UsageError, match=line):
        planned(*overrides)


def test_the_training_of_a_component_is_counted():
    """UCE trains nothing; with the stage it holds a LoRA on all layers, and eight rows with gradients."""
    assert footprint(planned(backbone="flux")).rows == 0
    plan = planned(STAGE, backbone="flux")
    step, rank = footprint(plan), BlindConfig().rank
    layers = plan.backbone.linears(plan.backbone_config)
    assert step.rows == 8
    assert 16 * rank * sum(2 * n**0.5 for n in layers.values()) / GIB < step.trained_gb < 3.0  # of squares, and of all


def test_the_work_of_a_component_is_counted():
    """Four words of 3,000 steps of four rows, 1,000 steps of eight, each with gradients, and 160 images of 28 steps."""
    alone, whole = (erase_rows(planned(*more, backbone="flux")) for more in ((), (STAGE,)))
    assert whole - alone == 3 * (4 * 3000 * 4 + 1000 * 8) + 160 * 28


def test_the_estimate_of_a_lora_covers_real_layers():
    plan = planned(STAGE)
    layers = plan.backbone.load(plan.backbone_config).denoiser.named_modules()
    linears = {name: module for name, module in layers if name in plan.backbone.linears(plan.backbone_config)}
    numbers = sum(BlindConfig().rank * (m.in_features + m.out_features) for m in linears.values())
    assert 16 * numbers / GIB <= footprint(plan).trained_gb <= 1.3 * 16 * numbers / GIB


FOREIGN = """
from erasekit import Component, hookimpl
from erasekit.settings import Settings


class MyConfig(Settings):
    strength: float = 1.0


class MyStage(Component):
    Config = MyConfig

    def __call__(self, ctx, deltas, method):
        from erasekit.erasures.deltas import scale

        return {name: scale(delta, self.config.strength) for name, delta in deltas.items()}


@hookimpl
def register_components(register):
    register("robustify", "my-stage", MyStage)
"""


def test_a_foreign_component_in_one_file_is_given_its_settings(tmp_path, tiny_folder):
    (tmp_path / "mine.py").write_text(FOREIGN)
    registries = plugins.load([THIRD_PARTY / "tiny_world.py", tmp_path / "mine.py"])
    flags = {"method": "uce", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
    found = []
    for more in ([], ["method.robustify=my-stage", "components.my-stage.strength=0.5"]):
        settings = [f"backbone.path={tiny_folder}", "backbone.device=cpu", *more]
        plan = resolve(build(flags, overrides=settings), registries)
        found.append(compute(plan, plan.backbone.load(plan.backbone_config), registries).total())
    whole, half = found
    assert whole.keys() == half.keys()
    for name in whole:
        torch.testing.assert_close(to_dense(half[name]), 0.5 * to_dense(whole[name]))


def test_weights_that_are_brought_layer_by_layer_are_not_trained_by_a_component():
    with pytest.raises(EnvironmentProblem, match=r"cannot be trained with --vram 8.* or leave 'blind' out"):
        preflight(planned(STAGE, "backbone.vram=8", backbone="flux"))
