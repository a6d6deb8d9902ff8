"""Deltas against plain matrices in float64."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from erasekit.erasures.deltas import (
    Dense,
    LowRank,
    add,
    check_layers,
    compress,
    distance,
    merge_,
    merged,
    norm,
    reduced,
    scale,
    summed,
    to_dense,
)
from erasekit.errors import ErasekitError


def low_rank(out, rank, width, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=g, dtype=dtype), torch.randn(rank, width, generator=g, dtype=dtype))


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)).to(dtype)


def test_adding_concatenates_by_rank_and_sums():
    a, b, c = low_rank(5, 2, 6, 1), low_rank(5, 3, 6, 2), Dense(to_dense(low_rank(5, 1, 6, 3)))
    both = add(a, b)
    assert isinstance(both, LowRank)
    assert both.rank == 5
    torch.testing.assert_close(to_dense(both), a.up @ a.down + b.up @ b.down)
    assert isinstance(add(a, c), Dense)
    torch.testing.assert_close(to_dense(add(a, c)), a.up @ a.down + c.weight)


def test_concatenating_sets_takes_the_union_in_order():
    a, b, c = low_rank(5, 2, 6, 1), low_rank(5, 1, 6, 2), low_rank(4, 1, 5, 3)
    total = summed([{"1": c, "0": a}, {"0": b, "2": c}])
    assert list(total) == ["1", "0", "2"]
    torch.testing.assert_close(to_dense(total["0"]), a.up @ a.down + b.up @ b.down)
    assert summed([]) == {}


def test_scaling():
    deltas = {"a": low_rank(5, 2, 6), "b": Dense(torch.ones(2, 3))}
    for name, delta in scale(deltas, -0.5).items():
        torch.testing.assert_close(to_dense(delta), -0.5 * to_dense(deltas[name]))


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), rank=st.integers(1, 30), true=st.integers(1, 9), seed=st.integers(0, 99))
def test_compressing_finds_the_rank_and_loses_nothing(out, width, rank, true, seed):
    mix = low_rank(out, true, width, seed)
    spread = torch.randn(true, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    delta = LowRank(mix.up @ spread, torch.linalg.pinv(spread) @ mix.down)
    full = to_dense(delta)
    found = int(torch.linalg.matrix_rank(full, rtol=1e-7))
    for given_delta in (delta, Dense(full)):
        small = compress(given_delta)
        assert small.rank == max(1, found) <= min(out, width)
        torch.testing.assert_close(to_dense(small), full, atol=1e-6 * float(full.norm()), rtol=0)
        torch.testing.assert_close(small.up.norm(dim=0), small.down.norm(dim=1))  # balanced


def test_compressing_nothing_keeps_rank_one():
    zero = compress(LowRank(torch.zeros(4, 3), torch.ones(3, 5)))
    assert zero.rank == 1
    assert not to_dense(zero).any()


def test_norm_is_the_frobenius_norm():
    delta = low_rank(7, 3, 9)
    assert norm(delta) == pytest.approx(float((delta.up @ delta.down).norm()), rel=1e-12)
    assert norm(Dense(to_dense(delta))) == pytest.approx(norm(delta), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_is_exact_before_the_cast_and_undone_bit_for_bit(dtype):
    net = model(dtype)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    deltas = {"0": low_rank(5, 2, 6), "1": Dense(0.1 * torch.ones(4, 5))}
    with merged(net, deltas):
        for name, delta in deltas.items():
            want = (before[f"{name}.weight"].float() + to_dense(delta).float()).to(dtype)
            assert torch.equal(net[int(name)].weight, want)
        assert torch.equal(net[0].bias, before["0.bias"])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    merge_(net, deltas)
    assert not torch.equal(net[0].weight, before["0.weight"])


def test_an_error_inside_also_restores():
    net = model()
    before = net[0].weight.clone()
    with pytest.raises(RuntimeError, match="inside"), merged(net, {"0": low_rank(5, 2, 6)}):
        raise RuntimeError("inside")
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize(("name", "delta"), [("0.nothing", low_rank(5, 1, 6)), ("1", low_rank(5, 1, 6))])
def test_a_delta_of_another_model_is_refused_and_changes_nothing(name, delta):
    net = model()
    before = net[0].weight.clone()
    with pytest.raises(ErasekitError, match=f"'{name}'.*another base"):
        merge_(net, {"0": low_rank(5, 1, 6), name: delta})
    assert torch.equal(net[0].weight, before)


class Packed(nn.Linear):
    """A layer that holds its weight as bytes in another shape, as four-bit layers do."""

    def __init__(self, whole: nn.Linear):
        super().__init__(whole.in_features, whole.out_features, bias=False)
        self.range = whole.weight.detach().abs().max() / 127
        packed = (whole.weight.detach() / self.range).round().to(torch.int8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.view(self.out_features, self.in_features) * self.range)


def test_a_packed_layer_has_the_delta_beside_it_and_is_never_written_to():
    whole = model()
    net = nn.Sequential(Packed(whole[0]), whole[1])
    deltas = {"0": low_rank(5, 2, 6, dtype=torch.float32), "1": Dense(torch.ones(4, 5))}
    x, bits = torch.randn(3, 6), net[0].weight.clone()
    before = net(x)
    with merged(net, deltas):
        hidden = net[0].forward(x) + x @ to_dense(deltas["0"]).T
        torch.testing.assert_close(net(x), hidden @ (whole[1].weight).T)
    assert torch.equal(net(x), before)
    assert torch.equal(net[0].weight, bits)
    with pytest.raises(ErasekitError, match="'0' holds its weight in four bits"):
        merge_(net, deltas)
    assert torch.equal(net(x), before)


def test_distance_is_that_of_all_layers_together():
    exact = {"a": low_rank(5, 2, 6, 1), "b": Dense(to_dense(low_rank(4, 2, 3, 2)))}
    near = {"a": low_rank(5, 1, 6, 3), "b": Dense(torch.full((4, 3), 0.5, dtype=torch.float64))}

    def squares(deltas):
        return sum(to_dense(d).square().sum() for d in deltas)

    wrong = squares(Dense(to_dense(near[name]) - to_dense(exact[name])) for name in exact)
    assert distance(near, exact) == pytest.approx(float((wrong / squares(exact.values())).sqrt()), rel=1e-12)
    assert distance(exact, exact) == pytest.approx(0, abs=1e-12)
    assert distance({}, {}) == 0.0
    assert distance(near, {"a": Dense(torch.zeros(5, 6))}) == 0.0


def test_a_lower_rank_costs_the_singular_values_that_go():
    delta = low_rank(6, 4, 7)
    values = torch.linalg.svdvals(to_dense(delta))
    low, cost = reduced({"a": delta, "b": Dense(to_dense(delta))}, 3)
    assert {d.rank for d in low.values()} == {3}
    assert cost == pytest.approx(float((values[3:].square().sum() / values.square().sum()).sqrt()), rel=1e-9)
    assert compress(Dense(torch.ones(2, 9)), rank=5).down.shape == (1, 9)


def test_what_is_said_of_a_layer_that_does_not_fit():
    net = model()
    with pytest.raises(ErasekitError, match=r"The delta of '1' is \(5, 6\), the module is \(4, 5\) there\."):
        check_layers(net, {"1": low_rank(5, 1, 6)})
    for name in ("2", ""):  # no module, and one without a weight
        with pytest.raises(ErasekitError, match=rf"The delta of '{name}' is \(5, 6\), the module is not there\."):
            check_layers(net, {name: low_rank(5, 1, 6)})
    assert check_layers(net, {"1": low_rank(4, 1, 5)}) == {"1": net[1]}
    assert check_layers(nn.ModuleDict({"e": nn.Embedding(3, 2)}), {"e": Dense(torch.ones(3, 2))})


@pytest.mark.parametrize(("delta", "field"), [(low_rank(2, 1, 2), "up"), (Dense(torch.ones(2, 2)), "weight")])
def test_a_delta_stays_what_it_is_and_equals_itself_alone(delta, field):
    with pytest.raises(FrozenInstanceError):
        setattr(delta, field, None)
    assert type(delta)(**vars(delta)) != delta
