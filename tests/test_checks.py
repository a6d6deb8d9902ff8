"""What a method may not hand over, each answered by a line that names the method and the layer."""

import pytest
import torch

from erasekit.erasures.deltas import Dense, LowRank
from erasekit.errors import ErasekitError
from erasekit.methods.context import RunContext
from erasekit.methods.method import Method
from erasekit.runs.compute import compute
from erasekit.testing import tiny
from erasekit.testing.world import Words
from tests.conftest import THIRD_PARTY

SITE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # (8, 32)


def low(out=8, rank=1, width=tiny.WIDTH):
    return LowRank(torch.ones(out, rank), torch.ones(rank, width))


def bad(value):
    up = torch.ones(8, 1)
    up[3, 0] = value
    return LowRank(up, torch.ones(1, tiny.WIDTH))


CASES = {
    "nothing": (None, "deltas is None, where a dictionary of {part: {layer: delta}} belongs"),
    "no layer": ({"cat": {}}, "changes nothing"),
    "parts missing": ({"cat": {SITE: low()}}, f"'cat'/'{SITE}' is a LowRank, where a dictionary of deltas belongs"),
    "concepts missing": ({SITE: low()}, f"'{SITE}' is a LowRank, where a dictionary of {{layer: delta}} belongs"),
    "a list": ({"cat": [low()]}, "'cat' is a list"),
    "none": ({"cat": {"edit": {SITE: None}}}, f"the delta of '{SITE}' in 'cat'/'edit' is None. Give a LowRank"),
    "a tensor": ({"cat": {"edit": {SITE: torch.ones(8, 32)}}}, f"'{SITE}' in 'cat'/'edit' is a tensor of shape (8, 32)"),
    "turned": ({"cat": {"edit": {SITE: low(32, 1, 8)}}}, "is (32, 8), the layer (out, in) = (8, 32)"),
    "dense": ({"cat": {"edit": {SITE: Dense(torch.ones(8, 8))}}}, "is (8, 8), the layer (out, in) = (8, 32)"),
    "ranks": (
        {"cat": {"edit": {SITE: LowRank(torch.ones(8, 2), torch.ones(1, 32))}}},
        "has 'up' (8, 2) and 'down' (1, 32). They are (out, rank) and (rank, in)",
    ),
    "a vector": ({"cat": {"edit": {SITE: LowRank(torch.ones(8), torch.ones(32))}}}, "has a tensor of shape (8,) as 'up'"),
    "integers": (
        {"cat": {"edit": {SITE: Dense(torch.ones(8, 32, dtype=torch.int))}}},
        "as 'weight'. Give a matrix of floating",
    ),
    "not a number": ({"cat": {"edit": {SITE: bad(float("nan"))}}}, "holds numbers in 'up' that are not finite"),
    "infinite": ({"cat": {"edit": {SITE: bad(float("inf"))}}}, "holds numbers in 'up' that are not finite"),
    "unknown": (
        {"cat": {"edit": {SITE.replace("attn2", "attn9"): low()}}},
        f"'tiny' has no such linear layer. Did you mean '{SITE}'?",
    ),
    "no text": ({"cat": {"edit": {3: low()}}}, "the delta of '3' in 'cat'/'edit': 'tiny' has no such linear layer"),
}


class Mine(Method):
    name = "mine"
    gives = None

    def erase(self, ctx):
        return self.erasure(ctx, deltas=self.gives)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_deltas_that_are_wrong_are_named(case, loaded, tiny_folder):
    backbone, deltas, says = tiny.load(tiny_folder), *CASES[case]
    if loaded:
        assert backbone.denoiser is not None
    method = Mine(None)
    method.config, method.gives = Method.Config(), deltas
    with pytest.raises(ErasekitError) as raised:
        method.erase(RunContext(backbone, (Words().concept("cat"),), Words()))
    line = str(raised.value)
    assert line.startswith("Method 'mine'")
    assert says in line
    assert "\n" not in line


def test_what_is_right_passes(sd):
    method = Mine(Method.Config())
    method.gives = {"cat": {"edit": {SITE: low()}, "more": {SITE: Dense(torch.ones(8, 32))}}}
    ctx = RunContext(sd, (Words().concept("cat"),), Words())
    assert method.erase(ctx).deltas == method.gives


def test_a_method_that_returns_nothing_is_told_what_to_return(tiny_folder):
    from erasekit.registration import plugins
    from erasekit.registration.registry import Entry
    from erasekit.runs.config import build
    from erasekit.runs.resolve import resolve

    class Silent(Method):
        name = "silent"

        def erase(self, ctx):
            self.erasure(ctx, deltas={"cat": {"edit": {SITE: low()}}})

    registries = plugins.load([THIRD_PARTY / "no_methods.py"])
    registries.methods.add(Entry("silent", Silent, "test", "test"))
    flags = {"method": "silent", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
    plan = resolve(build(flags, overrides=[f"backbone.path={tiny_folder}", "backbone.device=cpu"]), registries)
    with pytest.raises(ErasekitError, match=r"Method 'silent' returns NoneType from 'erase', not an Erasure\. End it with"):
        compute(plan, plan.backbone.load(plan.backbone_config), registries)
