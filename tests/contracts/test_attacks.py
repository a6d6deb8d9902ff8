"""What every attack owes on both families; the same function serves authors of others."""

import pytest
import torch

from erasekit.attacks.contract import check
from erasekit.erasures.deltas import LowRank
from erasekit.erasures.erasure import Erasure
from erasekit.methods.context import RunContext
from erasekit.registration import plugins
from tests.conftest import THIRD_PARTY
from tests.third_party.tiny_world import Words

REGISTRIES = plugins.load([THIRD_PARTY / "single_file_attack.py"])
SHORT = {
    "ring-a-bell": {"population": 6, "generations": 2, "tokens": 4, "queries": 2},
    "unlearndiff": {"steps": 2, "queries": 2, "points": 2},
    "p4d-n": {"steps": 2, "queries": 2, "tokens": 4},
    "p4d-k": {"steps": 2, "queries": 2, "restarts": 2},
    "concept-inversion": {"steps": 2, "queries": 2, "batch": 2},
    "relearn": {"at": (1, 2), "images": 2, "batch": 2},
    "noise": {"queries": 2},
    "classifier-guidance": {"queries": 2},
}
NAMES = [entry.name for entry in REGISTRIES.attacks.entries()]


@pytest.fixture(scope="module")
def ctx(backbone):
    task = Words()
    return RunContext(backbone, (task.concept("cat"),), task, component=lambda slot, name: Scorer)


class Scorer:
    """Likes red."""

    def text(self, prompts):
        return torch.ones(len(prompts), 1)

    def image(self, images):
        return images[:, :1].mean((2, 3))


@pytest.fixture(scope="module")
def erasure(backbone):
    site = backbone.text_sites()[0].name
    rows, columns = backbone.weight(site).shape
    down = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    deltas = {"cat": {"edit": {site: LowRank(0.05 * torch.ones(rows, 2), down)}}}
    return Erasure.of(backbone, (Words().concept("cat"),), method="test", config={}, deltas=deltas)


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_keeps_its_contract(name, ctx, erasure, tmp_path):
    kind = REGISTRIES.attacks.get(name)
    assert kind.name == name
    prompts = ctx.task.prompts("erase", ctx.concepts, "evaluation")
    prompts += [prompts[0]._replace(seed=prompts[0].seed + 1)]
    outcomes = check(kind, ctx, erasure, prompts, tmp_path, settings=SHORT.get(name))
    assert all(outcome.shown is False for outcome in outcomes)
    assert all(outcome.queries for outcome in outcomes)
