"""The adapter bank on a real UNet."""

from __future__ import annotations

import pytest
import torch

from erasekit.erasures.deltas import Dense, LowRank, merged, summed, to_dense
from erasekit.errors import UsageError
from erasekit.methods.adapters import AdapterBank
from erasekit.testing import tiny


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny.load(tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd"))


@pytest.fixture
def bank(backbone):
    bank = AdapterBank(backbone)
    yield bank
    bank.remove()


def predict(backbone):
    x, tau = backbone.latents([3, 4]), torch.tensor([0.3, 0.8])
    return backbone.predict(x, tau, backbone.encode(["a photo of a cat", "a dog"]))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stir(parameters, seed=0):
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator(seed)))


def random_delta(backbone, rank_of):
    modules = dict(backbone.denoiser.named_modules())
    return {
        n: LowRank(torch.full((len(modules[n].weight), rank_of(i)), 0.1), torch.full((rank_of(i), tiny.WIDTH), 0.05))
        for i, n in enumerate(backbone.lora_targets("kv"))
    }


def trainable(backbone):
    return {n for n, p in backbone.denoiser.named_parameters() if p.requires_grad}


def test_a_new_adapter_changes_nothing_and_takes_nothing_from_the_global_generator(backbone, bank):
    before = predict(backbone)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    bank.add("cat", backbone.lora_targets("attention"), 2, generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(predict(backbone), before)
    assert trainable(backbone) == set()


def test_initial_weights_hang_on_the_seed_only(backbone, bank):
    targets = backbone.lora_targets("kv")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        bank.add(name, targets, 2, generator(seed))
    a, b, c = (bank.deltas(n) for n in "abc")
    assert all(torch.equal(a[t].down, b[t].down) and not torch.equal(a[t].down, c[t].down) for t in targets)
    assert not any(a[t].up.any() for t in targets)
    assert max(float(a[t].down.abs().max()) for t in targets) <= tiny.WIDTH**-0.5


@pytest.mark.parametrize("rank", [1, 8])
def test_gaussian_weights_have_a_deviation_of_one_over_the_rank(backbone, bank, rank):
    targets = backbone.lora_targets("all")
    bank.add("cat", targets, rank, generator(), init="gaussian")
    drawn = torch.cat([delta.down.flatten() for delta in bank.deltas("cat").values()])
    assert drawn.std().item() == pytest.approx(1 / rank, rel=0.1)
    assert drawn.mean().item() == pytest.approx(0, abs=0.1 / rank)
    assert drawn.abs().max() > 2.5 / rank


def test_alpha_over_rank_of_a_lora_counts_in_predictions_and_deltas_alike(backbone, bank):
    targets = backbone.lora_targets("kv")
    bank.add("cat", targets, 4, generator(), alpha=1.0)
    stir(bank.train_only("cat"))
    named, deltas = dict(backbone.denoiser.named_parameters()), bank.deltas("cat")
    for target in targets:
        b, a = (named[f"{target}.lora_{side}.bank_0.weight"].detach() for side in "BA")
        torch.testing.assert_close(to_dense(deltas[target]), b @ a / 4)
    with_bank = predict(backbone)
    bank.remove()
    with merged(backbone.denoiser, deltas):
        torch.testing.assert_close(predict(backbone), with_bank, rtol=1e-4, atol=1e-5)


def test_all_active_one_trainable(backbone, bank):
    targets = backbone.lora_targets("kv")
    for name in ("cat", "dog. and 'more'"):  # free text, dots included
        bank.add(name, targets, 2, generator())
    stir(bank.train_only("cat"))
    with_cat = predict(backbone)
    parameters = bank.train_only("dog. and 'more'")
    assert len(parameters) == 2 * len(targets)
    assert {id(p) for p in parameters} == {id(p) for p in backbone.denoiser.parameters() if p.requires_grad}
    assert torch.equal(predict(backbone), with_cat)  # cat stays active
    assert [p.shape for p in bank.train_only("cat")] == [p.shape for p in bank.train_only("cat")]
    stir(bank.train_only("dog. and 'more'"))
    predict(backbone).square().sum().backward()
    assert all(p.grad is not None for p in bank.train_only("dog. and 'more'"))
    assert all(p.grad is None for p in bank.train_only("cat"))


def test_one_alone_predicts_as_if_there_were_no_other(backbone, bank):
    bank.add("cat", backbone.lora_targets("kv"), 2, generator())
    stir(bank.train_only("cat"))
    cat = predict(backbone)
    bank.add("dog", backbone.lora_targets("kv"), 2, generator())
    stir(bank.train_only("dog"))
    both = predict(backbone)
    parameters = bank.train_only("cat", alone=True)
    assert torch.equal(predict(backbone), cat)
    assert {id(p) for p in parameters} == {id(p) for p in backbone.denoiser.parameters() if p.requires_grad}
    with bank.teacher():
        pass
    assert torch.equal(predict(backbone), cat)  # still
    bank.train_only("cat")
    assert torch.equal(predict(backbone), both)


def test_teacher_is_the_base_bit_for_bit_and_leaves_no_trace(backbone, bank):
    base = predict(backbone)
    bank.add("cat", backbone.lora_targets("all"), 2, generator())
    bank.add("dog", backbone.lora_targets("kv"), 1, generator())
    stir(bank.train_only("dog"))
    parameters = bank.train_only("cat")
    stir(parameters)
    student, mine = predict(backbone), trainable(backbone)
    assert not torch.allclose(student, base, atol=1e-3)
    with bank.teacher():
        inside = predict(backbone)
        with bank.teacher():
            pass
        assert torch.equal(predict(backbone), base)  # leaving the inner one did not turn them on
    assert torch.equal(inside, base)
    assert not inside.requires_grad
    assert trainable(backbone) == mine
    assert torch.equal(predict(backbone), student)


def test_gradients_cross_a_teacher_pass(backbone, bank):
    """Student forward, teacher forward, backward: the order of a training step."""
    bank.add("cat", backbone.lora_targets("kv"), 2, generator())
    parameters = bank.train_only("cat")
    stir(parameters)
    student = predict(backbone)
    with bank.teacher():
        target = predict(backbone)
    (student - target).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_an_error_in_the_teacher_pass_turns_the_adapters_on_again(backbone, bank):
    bank.add("cat", backbone.lora_targets("kv"), 2, generator())
    stir(bank.train_only("cat"))
    student = predict(backbone)
    with pytest.raises(RuntimeError, match="out of memory"), bank.teacher():
        raise RuntimeError("out of memory")
    assert torch.equal(predict(backbone), student)


def test_deltas_are_what_the_adapters_do(backbone, bank):
    bank.add("cat", backbone.lora_targets("attention"), 3, generator())
    bank.add("dog", backbone.lora_targets("kv"), 2, generator(), alpha=1.0)
    for name in bank.names:
        stir(bank.train_only(name))
    adapted, deltas = predict(backbone), [bank.deltas(name) for name in bank.names]
    bank.remove()
    with merged(backbone.denoiser, summed(deltas)):
        assert (predict(backbone) - adapted).abs().max() < 1e-5


def test_frozen_deltas_do_what_they_do_when_merged_and_come_back_as_they_were(backbone, bank):
    given = random_delta(backbone, lambda i: 1 + i % 3)  # ranks differ from layer to layer
    bank.add_frozen("part", given)
    adapted, again = predict(backbone), bank.deltas("part")
    assert all(torch.equal(to_dense(again[n]), to_dense(d)) for n, d in given.items())
    assert again.keys() == given.keys()
    assert not trainable(backbone)
    bank.remove()
    with merged(backbone.denoiser, given):
        assert (predict(backbone) - adapted).abs().max() < 1e-5


def test_removing_leaves_the_denoiser_as_it_was(backbone):
    modules = {n: id(m) for n, m in backbone.denoiser.named_modules()}
    before, bank = predict(backbone), AdapterBank(backbone)
    bank.add("cat", backbone.lora_targets("all"), 2, generator())
    stir(bank.train_only("cat"))
    bank.remove()
    assert {n: id(m) for n, m in backbone.denoiser.named_modules()} == modules
    assert torch.equal(predict(backbone), before)
    assert not getattr(backbone.denoiser, "peft_config", None)
    bank.add("cat", backbone.lora_targets("kv"), 2, generator())  # the name is free again
    bank.remove()
    bank.remove()


def test_a_half_precision_denoiser_gets_float32_adapters(tmp_path):
    backbone = tiny.load(tiny.save_pipeline(tmp_path / "sd"), dtype="bfloat16")
    bank = AdapterBank(backbone)
    bank.add("cat", backbone.lora_targets("kv"), 2, generator())
    assert {p.dtype for p in bank.train_only("cat")} == {torch.float32}
    assert predict(backbone).dtype == torch.bfloat16


def test_mistakes_are_one_line(backbone, bank):
    bank.add("cat", backbone.lora_targets("kv"), 2, generator())
    site = backbone.lora_targets("kv")[0]
    cases = [
        (lambda: bank.add("cat", [site], 2, generator()), "Adapter 'cat' is there already"),
        (lambda: bank.add("dog", ["nothing.there"], 2, generator()), "has no module 'nothing.there'"),
        (lambda: bank.add("dog", [], 2, generator()), "Adapter 'dog' is empty"),
        (lambda: bank.add_frozen("dog", {site: Dense(torch.ones(8, tiny.WIDTH))}), "is dense"),
        (lambda: bank.train_only("dgo"), "no adapter 'dgo'; there are cat"),
    ]
    for call, message in cases:
        with pytest.raises(UsageError, match=message):
            call()
    assert bank.names == ["cat"]
