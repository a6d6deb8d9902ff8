import numpy as np
import pytest
import torch

from erasekit.backbones.schedule import ddpm_tau, flow_tau, is_late
from erasekit.erasures.deltas import Dense, LowRank, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into
from erasekit.errors import UsageError
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.students import masked
from erasekit.testing import tiny
from erasekit_ant import maths
from erasekit_ant.method import Ant, AntConfig
from tests.third_party.tiny_world import Words

SMALL = {"steps": 3, "batch": 2, "rank": 2, "trajectories": 3, "saliency_draws": 2, "fusion_points": 9}


@pytest.fixture
def context(backbone):
    def make(names=("cat",), seed=0):
        task = Words()
        return RunContext(backbone, tuple(task.concept(name) for name in names), task, seed)

    return make


def ant(backbone, **others):
    """ANT as the family's mini model has it, all terms counting, and what a test asks for."""
    mini = {"unet": "sd15-mini", "dit": "flux-mini"}[backbone.capabilities.family]
    defaults = Ant.defaults.get(backbone.capabilities.family, {}) | Ant.defaults[mini] | {"early_weight": 1.0}
    return Ant(AntConfig(**defaults | SMALL | others))


# Which end of time is reversed


@pytest.mark.parametrize("tau", [ddpm_tau(torch.tensor([999, 900, 600, 0])), flow_tau(torch.tensor([1.0, 0.9, 0.6, 0.01]))])
def test_the_guidance_is_kept_at_the_noise_and_reversed_towards_the_image(tau):
    concept, empty = np.random.default_rng(0).normal(size=(2, 4, 3, 5))
    found = maths.target(torch.from_numpy(concept), torch.from_numpy(empty), tau, tau0=0.14, eta=1.3)
    for i, sign in enumerate((1, 1, -1, -1)):  # timesteps and sigmas fall from the noise to the image
        np.testing.assert_allclose(found[i].numpy(), (1 - sign * 1.3) * empty[i] + sign * 1.3 * concept[i], rtol=1e-12)


def test_the_step_at_tau0_itself_is_late():
    tau = torch.tensor([0.1, 0.14, 0.2], dtype=torch.float32).double()  # rounded, as latents round it
    assert is_late(tau, 0.14).tolist() == [False, True, True]


def test_the_points_that_are_reversed_are_not_the_noise(backbone, context):
    ctx = context()
    method = ant(backbone, tau0=0.3)
    pool = method.pool(ctx, ctx.concepts[0])
    seeds = torch.randint(2**31, (3,), generator=ctx.generator("ant/pool/cat")).tolist()
    noise = backbone.latents(seeds, ctx.protocol.size)
    late = is_late(pool.tau, 0.3)
    assert torch.equal(pool.x[~late], noise)
    assert late.sum() == len(pool.x) - 3
    empty, concept = pool.predictions.unbind(1)
    found = maths.target(concept, empty, pool.tau, tau0=0.3, eta=1.0)
    torch.testing.assert_close(found[~late], concept[~late])
    torch.testing.assert_close(found[late], 2 * empty[late] - concept[late])


def test_without_a_late_step_there_is_one_line(backbone, context):
    ctx = context()
    with pytest.raises(UsageError, match=r"None of 2 sampling steps is at tau >= 0\.9"):
        ant(backbone, tau0=0.9).erase(ctx)


# Losses


def test_losses_of_the_base_against_numpy(backbone, context):
    """The untouched base is at its goal early and on the empty prompt, and (1 + eta) |f(c) - f(0)| away from it late."""
    ctx, weights = context(), {"early_weight": 2.5, "unconditional_weight": 0.5, "eta": 1.0, "tau0": 0.3}
    method = ant(backbone, **weights, batch=3)
    pool = method.pool(ctx, ctx.concepts[0])
    nothing = backbone.encode([""])
    with torch.no_grad():
        out = method.losses(ctx.predict, [pool], nothing)(0, ctx.generator("draw"))
        shifted = method.losses(lambda *at: ctx.predict(*at) + 0.1, [pool], nothing)(0, ctx.generator("draw"))
    points = pool.at(is_late(pool.tau, 0.3)).sample(3, ctx.generator("draw"))
    empty, concept = points.predictions.double().unbind(1)
    gap = 2 * (concept - empty).numpy()
    assert out["late"].item() == pytest.approx((gap**2).mean(), rel=1e-3)
    for name in ("early", "early_unconditional", "late_unconditional"):
        assert out[name].item() < 1e-8
    assert shifted["early"].item() == pytest.approx(2.5 * 0.01, rel=1e-3)
    assert shifted["late_unconditional"].item() == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert shifted["early_unconditional"].item() == pytest.approx(2.5 * 0.5 * 0.01, rel=1e-3)
    assert shifted["late"].item() == pytest.approx(((gap + 0.1) ** 2).mean(), rel=1e-3)


def test_what_counts_nothing_is_not_predicted_and_changes_nothing_else(backbone, context):
    ctx, calls = context(), []

    def predict(x, tau, cond):
        calls.append(len(x))
        return ctx.predict(x, tau, cond)

    with torch.no_grad():
        both, late = (
            (method := ant(backbone, tau0=0.3, early_weight=weight)).losses(
                predict, [method.pool(ctx, ctx.concepts[0])], backbone.encode([""])
            )
            for weight in (0.05, 0.0)
        )
        generators = [ctx.generator("draw"), ctx.generator("draw")]
        for batch in range(2):
            wanted, found = both(batch, generators[0]), late(batch, generators[1])
            assert list(found) == ["late", "late_unconditional"]
            assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert len(calls) == 2 * (2 + 1)


# Who is trained


def test_every_term_has_a_gradient_in_every_weight_and_in_no_other(backbone, context):
    ctx = context()
    method, student = ant(backbone, tau0=0.3), masked(ctx, backbone.lora_targets("all"), {})
    pool = method.pool(ctx, ctx.concepts[0])
    for change in student.parameters:  # away from the base, where terms other than the late one are zero
        change.data.normal_(std=1e-2, generator=ctx.generator("change"))
    losses = method.losses(student.predict, [pool], backbone.encode([""]))(0, ctx.generator("batch"))
    assert list(losses) == ["late", "late_unconditional", "early", "early_unconditional"]
    linear = {n for n, m in backbone.denoiser.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(student.layers) == linear
    for value in losses.values():
        gradients = torch.autograd.grad(value, student.parameters, retain_graph=True)
        assert all(g.abs().max() > 0 for g in gradients)
    losses["late"].backward()
    assert all(p.grad is None for p in backbone.denoiser.parameters())


def test_every_term_has_a_gradient_in_every_factor_of_a_lora_and_nowhere_else(backbone, context):
    ctx = context()
    method = ant(backbone, tau0=0.3)
    pool, bank = method.pool(ctx, ctx.concepts[0]), AdapterBank(backbone)
    bank.add("lora", backbone.lora_targets(method.config.scope), 2, ctx.generator("init"))
    parameters = bank.train_only("lora")
    try:
        for parameter in parameters:
            parameter.data.normal_(std=0.1, generator=ctx.generator("B"))
        losses = method.losses(ctx.predict, [pool], backbone.encode([""]))(0, ctx.generator("batch"))
        for value in losses.values():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            assert all(g.abs().max() > 0 for g in gradients)
        losses["late"].backward()
        assert {id(p) for p in backbone.denoiser.parameters() if p.grad is not None} == {id(p) for p in parameters}
    finally:
        bank.remove()


def test_a_lora_has_all_layers_of_its_scope(backbone, context):
    ctx = context()
    method = ant(backbone, tau0=0.3, lora_scale=1.0)
    pool = method.pool(ctx, ctx.concepts[0])
    trained = method.lora(ctx, 0, pool)
    assert set(trained) == set(backbone.lora_targets(method.config.scope))
    assert all(delta.up.abs().max() > 0 and delta.rank == 2 for delta in trained.values())
    louder = ant(backbone, tau0=0.3, lora_scale=4.3).lora(ctx, 0, pool)
    for name, delta in trained.items():
        torch.testing.assert_close(to_dense(louder[name]), 4.3 * to_dense(delta))


@pytest.mark.parametrize(("keep", "count"), [(0.5, 4), (1.0, 8), (0.01, 1), (0.3, 3)])
def test_salient_keeps_the_largest(keep, count):
    gradient = torch.tensor([[3.0, -8.0, 1.0, 0.5], [-2.0, 7.0, -0.1, 4.0]])
    mask = maths.salient(gradient, keep)
    order = np.argsort(-np.abs(gradient.numpy()).ravel())
    assert set(np.flatnonzero(mask.numpy().ravel())) == set(order[:count])


def test_saliency_is_where_the_late_gradient_is_large_and_nothing_else_moves(backbone, context):
    ctx = context()
    method = ant(backbone, form="single", saliency_draws=1, tau0=0.3, saliency=0.25)
    pool, student = method.pool(ctx, ctx.concepts[0]), masked(ctx, backbone.lora_targets("all"), {})
    losses = method.losses(student.predict, [pool], backbone.encode([""]))
    masks = method.saliency(ctx, student, losses, 1)
    late = losses(0, ctx.generator("ant/saliency/0/0"))["late"]
    gradients = torch.autograd.grad(late, student.parameters)
    for mask, gradient in zip(masks.values(), gradients, strict=True):
        assert gradient.abs()[mask].min() >= gradient.abs()[~mask].max()
        assert mask.double().mean().item() == pytest.approx(0.25, abs=1 / mask.numel() + 0.02)
    deltas = method.single(ctx, [pool])
    assert all((deltas[name].weight[~mask] == 0).all() for name, mask in masks.items())
    assert all((deltas[name].weight[mask] != 0).double().mean() > 0.5 for name, mask in masks.items())


def test_more_draws_keep_less_and_more_concepts_keep_more(backbone, context):
    ctx = context(("cat", "dog"))
    student = masked(ctx, backbone.lora_targets("all"), {})
    share = {}
    for draws, concepts in ((1, 1), (4, 1), (4, 2)):
        method = ant(backbone, saliency_draws=draws, tau0=0.3)
        pools = [method.pool(ctx, concept) for concept in ctx.concepts[:concepts]]
        masks = method.saliency(ctx, student, method.losses(student.predict, pools, backbone.encode([""])), concepts)
        share[draws, concepts] = sum(int(mask.sum()) for mask in masks.values())
    assert share[4, 1] < share[1, 1]
    assert share[4, 1] < share[4, 2]


# Fusion


def test_fused_loras_act_as_they_did_alone_better_than_their_sum_and_keep_what_is_preserved(tiny_folder):
    backbone, task = tiny.load(tiny_folder), Words()
    ctx = RunContext(backbone, tuple(task.concept(name) for name in ("cat", "dog")), task)
    method = ant(backbone, fusion_preserve=0.0)
    pools = [method.pool(ctx, concept) for concept in ctx.concepts]
    loras = [method.lora(ctx, i, pool) for i, pool in enumerate(pools)]
    faithful, careful = method.fuse(ctx, pools, loras), ant(backbone, fusion_preserve=100.0).fuse(ctx, pools, loras)
    seen = [pool.sample(9, ctx.generator(f"ant/fusion/{i}")) for i, pool in enumerate(pools)]
    tokens = [points.cond.tokens[points.row].double().flatten(0, 1) for points in seen]
    ship = backbone.encode([*(p.text for p in ctx.prompts("preserve")), ""]).tokens.double()
    for name in loras[0]:
        alone = [to_dense(lora[name]).double() for lora in loras]
        fused = sum(to_dense(own[name]) for own in faithful)
        error = {
            which: sum((x @ (delta - d).T).square().sum() for x, d in zip(tokens, alone, strict=True))
            for which, delta in (("fused", fused), ("sum", sum(alone)))
        }
        assert error["fused"] < error["sum"]
        kept = sum(to_dense(own[name]) for own in careful)
        assert (ship @ kept.T).norm() < 0.1 * (ship @ sum(alone).T).norm()


# Whole erasures


@pytest.mark.parametrize("form", ["single", "multi"])
@pytest.mark.parametrize("names", [("cat",), ("cat", "dog")])
def test_an_erasure_leaves_the_base_and_loads(backbone, context, tmp_path, form, names):
    before = {key: value.clone() for key, value in backbone.denoiser.state_dict().items()}
    erasure = ant(backbone, form=form).erase(context(names))
    after = backbone.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad or p.grad is not None for p in backbone.denoiser.parameters())
    kind = Dense if form == "single" else LowRank
    entries = ["shared"] if form == "single" and len(names) > 1 else list(names)
    assert list(erasure.deltas) == entries
    for parts in erasure.deltas.values():
        for deltas in parts.values():
            assert {type(delta) for delta in deltas.values()} == {kind}
            assert any(to_dense(delta).abs().max() > 0 for delta in deltas.values())
    erasure.save(tmp_path / "erasure")
    assert Erasure.load(tmp_path / "erasure", backbone).total().keys() == erasure.total().keys()
    load_into(backbone.pipeline(), tmp_path / "erasure", base=backbone)


@pytest.mark.parametrize("form", ["single", "multi"])
def test_a_seed_decides_every_byte(backbone, context, tmp_path, form):
    method = ant(backbone, form=form)
    hashes = [method.erase(context(seed=seed)).save(tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("form", ["single", "multi"])
def test_training_lowers_the_sum_of_the_losses(backbone, context, form):
    ctx, seen = context(), []
    ctx.log = lambda step, total, values: seen.append(sum(values.values()))
    ant(backbone, form=form, steps=30, batch=4, tau0=0.3, lr={"single": 3e-3, "multi": 2e-2}[form]).erase(ctx)
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])
