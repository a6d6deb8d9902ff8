import numpy as np
import pytest
import torch

from erasekit.backbones.protocol import guided
from erasekit.erasures.deltas import Dense, LowRank, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into
from erasekit.methods.context import RunContext
from erasekit.methods.students import lora, whole
from erasekit.methods.trajectories import negative_guidance
from erasekit.testing import tiny, tiny_flux
from erasekit_esd.layers import modules
from erasekit_esd.method import Esd, EsdConfig
from tests.third_party.tiny_world import Words

SMALL = {"steps": 3, "batch": 2, "rank": 2, "trajectories": 3}
GUIDANCE = 3.0


class OneWord(Words):
    """No training prompts but the concept's own."""

    def prompts(self, which, concepts, split, limit=None):
        return []


@pytest.fixture
def context(backbone):
    def make(names=("cat",), seed=0):
        task = Words()
        return RunContext(backbone, tuple(task.concept(name) for name in names), task, seed)

    return make


def settings(backbone, **others):
    """What the family's mini model has, then what a test asks for."""
    mini = {"unet": "sd15-mini", "dit": "flux-mini"}[backbone.capabilities.family]
    return EsdConfig(**Esd.defaults.get(backbone.capabilities.family, {}) | Esd.defaults[mini] | SMALL | others)


# The target


def test_negative_guidance_against_numpy():
    generator = np.random.default_rng(0)
    anchor, concept, empty = generator.normal(size=(3, 4, 2, 5))
    target = negative_guidance(*map(torch.from_numpy, (anchor, concept, empty)), 1.7)
    expected = np.empty_like(anchor)
    for index in np.ndindex(anchor.shape):
        expected[index] = anchor[index] - 1.7 * concept[index] + 1.7 * empty[index]
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("newer", [1.0, 2.0, 3.5])
def test_eta_of_newer_code_is_one_more_for_the_same_target(newer):
    concept, empty = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = concept - newer * (concept - empty)
    torch.testing.assert_close(negative_guidance(empty, concept, empty, newer - 1), theirs, rtol=0, atol=1e-12)


# Which layers


def test_variants_of_a_unet(tiny_folder):
    backbone = tiny.load(tiny_folder)
    names = {variant: modules(backbone, variant) for variant in ("x", "x-strict", "u", "all")}
    assert all(".attn2." in name for name in names["x"])
    assert {name.split(".attn2.")[1] for name in names["x"]} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert names["x-strict"] == [site.name for site in backbone.text_sites()]
    assert {"time_embedding.linear_1"} < set(names["u"])
    assert any(".attn1." in name for name in names["u"])
    assert set(names["x"]).isdisjoint(names["u"])
    assert {*names["x"], *names["u"]} == set(names["all"]) == set(backbone.lora_targets("all"))


def test_variants_of_a_transformer_hold_the_text_stream(tiny_flux_folder):
    backbone = tiny_flux.load(tiny_flux_folder)
    names = {variant: modules(backbone, variant) for variant in ("x", "x-strict", "u", "all")}
    assert set(names["x"]) == set(backbone.lora_targets("all_attn"))
    assert set(backbone.lora_targets("add_kv")) < set(names["x-strict"])
    kinds = {name.split(".attn.")[1] for name in names["x-strict"]}
    assert kinds == {"to_k", "to_v", "add_k_proj", "add_v_proj"}
    assert {*backbone.lora_targets("text"), "single_transformer_blocks.0.proj_mlp"} < set(names["u"])
    assert set(names["x"]).isdisjoint(names["u"])
    assert {*names["x"], *names["u"]} == set(names["all"])


@pytest.mark.parametrize(
    ("kinds", "variant"), [(["style"], "x"), (["identity"], "x"), (["object"], "u"), (["style", "nsfw"], "u"), (["free"], "x")]
)
def test_auto_follows_the_kind(kinds, variant):
    concepts = [Words().concept("cat").model_copy(update={"kind": kind}) for kind in kinds]
    assert Esd(EsdConfig(variant="auto")).variant(concepts) == variant
    assert Esd(EsdConfig(variant="all")).variant(concepts) == "all"


# The pool


@pytest.mark.parametrize("anchor", ["empty", "neutral"])
def test_a_pool_is_the_base_guided_and_its_target_the_formula(backbone, anchor):
    concept = OneWord().concept("cat").model_copy(update={"phrases": ("a cat",), "templates": ("{}",)})
    ctx = RunContext(backbone, (concept,), OneWord())
    method = Esd(settings(backbone, anchor=anchor, eta=1.5, guidance=GUIDANCE, trajectories=2))
    pool = method.pool(ctx, concept)
    schedule, size = backbone.schedule(ctx.protocol.steps, ctx.protocol.size), ctx.protocol.size
    cat, start, empty = (backbone.encode([text]).repeat(2) for text in ("a cat", "thing" if anchor == "neutral" else "", ""))
    seeds = torch.randint(2**31, (2,), generator=ctx.generator(f"esd/pool/{concept.name}")).tolist()
    x = backbone.latents(seeds, size)
    scale = ctx.protocol.guidance if backbone.embedded_guidance else GUIDANCE
    assert len(pool) == 2 * len(schedule)
    for k, tau in enumerate(schedule.tau.tolist()):
        here = slice(2 * k, 2 * k + 2)
        torch.testing.assert_close(pool.x[here], x, rtol=1e-4, atol=1e-5)
        assert pool.tau[here].tolist() == [tau, tau]
        with torch.no_grad():
            at = (pool.x[here], pool.tau[here])
            f_anchor, f_cat, f_empty = (ctx.predict(*at, cond).double().numpy() for cond in (start, cat, empty))
            direction = guided(backbone, x, pool.tau[here], cat, uncond=empty, scale=scale)
        expected = f_anchor - 1.5 * (f_cat - f_empty)
        np.testing.assert_allclose(pool.predictions[here, 0].numpy(), expected, rtol=1e-4, atol=1e-5)
        x = backbone.step(direction, x, k, schedule)


def test_a_sample_keeps_points_and_prompts_together(backbone, context):
    ctx = context()
    pool = Esd(settings(backbone, trajectories=6)).pool(ctx, ctx.concepts[0])
    drawn = pool.sample(20, ctx.generator("draw"))
    for i in range(20):
        index = int((pool.x == drawn.x[i]).flatten(1).all(1).nonzero()[0])
        assert torch.equal(drawn.predictions[i], pool.predictions[index])
        assert torch.equal(drawn.cond.tokens[i], pool.cond.tokens[pool.row[index]])
        assert drawn.tau[i] == pool.tau[index]


# Who is trained


@pytest.mark.parametrize("variant", ["x", "x-strict", "u", "all"])
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_gradients_reach_every_trained_parameter_and_no_other(backbone, context, variant, weights):
    ctx, names = context(), modules(backbone, variant)
    method = Esd(settings(backbone))
    pools = [method.pool(ctx, ctx.concepts[0])]

    def check(student):
        if weights == "lora":
            for parameter in student.parameters:
                parameter.data.normal_(generator=ctx.generator("B"))  # B is zero at first and keeps gradients from A
        method.losses(student, pools)(0, ctx.generator("batch"))["erase"].backward()
        assert len(student.parameters) == len(names) * (1 if weights == "full" else 2)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters)
        mine = {id(p) for p in student.parameters}
        assert all(p.grad is None for p in backbone.denoiser.parameters() if id(p) not in mine)
        assert set(student.deltas()) == set(names)

    if weights == "full":
        check(whole(ctx, names))
    else:
        with lora(ctx, "esd", names, 2, ctx.generator("esd/init")) as student:
            check(student)


def test_whole_weights_stand_in_only_while_the_student_predicts(backbone, context):
    ctx = context()
    pool = Esd(settings(backbone)).pool(ctx, ctx.concepts[0])
    student = whole(ctx, modules(backbone, "x"))
    before = ctx.predict(pool.x, pool.tau, pool.cond[pool.row])
    assert torch.equal(student.predict(pool.x, pool.tau, pool.cond[pool.row]), before)
    with torch.no_grad():
        for weight in student.parameters:
            weight.mul_(1.5)
    assert not torch.allclose(student.predict(pool.x, pool.tau, pool.cond[pool.row]), before)
    assert torch.equal(ctx.predict(pool.x, pool.tau, pool.cond[pool.row]), before)


# Whole erasures


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_training_comes_nearer_to_the_target(backbone, context, weights):
    ctx, seen = context(), []
    ctx.log = lambda step, total, values: seen.append(values["erase"])
    rate = {"full": 3e-3, "lora": 2e-2}[weights]
    Esd(settings(backbone, weights=weights, variant="x", steps=30, batch=6, lr=rate)).erase(ctx)
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])


@pytest.mark.parametrize(("weights", "variant"), [("full", "all"), ("lora", "all"), ("full", "x-strict")])
def test_an_erasure_leaves_the_base_and_loads(backbone, context, tmp_path, weights, variant):
    before = {key: value.clone() for key, value in backbone.denoiser.state_dict().items()}
    erasure = Esd(settings(backbone, weights=weights, variant=variant)).erase(context())
    after = backbone.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad or p.grad is not None for p in backbone.denoiser.parameters())
    (deltas,) = erasure.deltas["cat"].values()
    assert set(deltas) == set(modules(backbone, variant))
    assert {type(delta) for delta in deltas.values()} == {Dense if weights == "full" else LowRank}
    erasure.save(tmp_path / "erasure")
    loaded = Erasure.load(tmp_path / "erasure", backbone)
    for name, delta in loaded.total().items():
        torch.testing.assert_close(to_dense(delta), to_dense(deltas[name]), rtol=1e-4, atol=1e-6)
    load_into(backbone.pipeline(), tmp_path / "erasure", base=backbone)


def test_concepts_share_weights_and_a_seed_decides_every_byte(backbone, context, tmp_path):
    method = Esd(settings(backbone))
    hashes = []
    for i, seed in enumerate((0, 0, 1)):
        erasure = method.erase(context(("cat", "dog"), seed))
        assert list(erasure.deltas) == ["shared"]
        hashes.append(erasure.save(tmp_path / str(i)))
    assert hashes[0] == hashes[1] != hashes[2]
