from types import SimpleNamespace

import pytest
import torch

from erasekit.backbones.protocol import guided
from erasekit.backbones.schedule import ddpm_tau, flow_tau
from erasekit.erasures.deltas import to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.evaluation.tasks import Protocol
from erasekit.methods.closedform import Moment, Pairs
from erasekit.methods.context import RunContext
from erasekit.methods.trajectories import negative_guidance
from erasekit.registration.plugins import default
from erasekit.testing import tiny
from erasekit_rece.method import robustify
from erasekit_trace import losses, slots
from erasekit_trace.divergence import probe
from erasekit_trace.method import Trace, TraceConfig
from erasekit_trace.plugin import SLOTS
from erasekit_trace.pool import clean_pool, pair_pool, target_pool
from tests.third_party.tiny_world import Words

COMPONENT = default().components.get

STEPS = 6
GUIDANCE = 2.0
TAU0 = 0.4
PROTOCOL = Protocol(steps=STEPS, guidance=GUIDANCE, size=16)
TURN = {"tau0": TAU0, "eta_neg": 0.5}
SEEDS = [5, 6, 7]
SMALL = {
    "steps": 4,
    "batch": 3,
    "rank": 2,
    "eta": 0.5,
    "trajectories": 4,
    "clean_trajectories": 4,
    "preserve": 1.0,
    "integration": "pairs",
    "integration_every": 1,
    "integration_weight": 0.1,
    "divergence_every": 1,
    "divergence_weight": 0.05,
    "window": "late",
    "tau0": 0.15,
    "bank": "per-concept",
}


@pytest.fixture(scope="module")
def backbone(tiny_folder):
    return tiny.load(tiny_folder)


@pytest.fixture
def context(backbone):
    def make(names=("cat", "dog"), seed=0, directory=None):
        task = Words()
        return RunContext(
            backbone, tuple(task.concept(name) for name in names), task, seed, directory, component=default().components.get
        )

    return make


@pytest.fixture
def prompts(backbone):
    return {name: backbone.encode([f"a photo of a {name}"]) for name in ("cat", "dog", "thing", "ship", "red")}


def doubles(*shape, n=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n)]


# Refinement


def test_the_uce_refinement_holds_preserved_prompts_and_captions():
    """The minimiser of its objective, by hand: any other edit of W costs more."""
    width = 5
    w, u, kept, seen = doubles(7, width, n=4)
    pairs, moments = Pairs.empty(width).add(w, u), [Moment(side.T @ side, len(side)) for side in (kept, seen)]
    e = SimpleNamespace(pairs=(pairs,), preserve=moments[0], captions=moments[1])
    config = TraceConfig(refine="uce", ridge=0.2, preserve_scale=0.5, caption_scale=0.3, rank_error=0)
    weight = doubles(3, width, n=1)[0]
    (edit,) = slots.uce(e, config)
    edited = weight + weight @ edit.difference_DN @ edit.read_ND
    c_DD = w.T @ w + 0.5 * kept.T @ kept + 0.3 * seen.T @ seen
    ridge = 0.2 * c_DD.trace() / width

    def cost(matrix):
        held = 0.5 * ((matrix - weight) @ kept.T).square().sum() + 0.3 * ((matrix - weight) @ seen.T).square().sum()
        return (matrix @ w.T - weight @ u.T).square().sum() + held + ridge * (matrix - weight).square().sum()

    for other in torch.randn(20, 3, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64):
        assert cost(edited) < cost(edited + 1e-3 * other)


@pytest.mark.parametrize("refine", ["whitened", "uce"])
def test_the_empty_prompt_is_held(wide, refine):
    """Guidance's other branch: of its embeddings hardly anything moves, at every site and position."""
    task = Words()
    ctx = RunContext(wide, (task.concept("cat"),), task, component=COMPONENT)
    settings = {"whitened": {"ridge": 0.3, "preserve_scale": 10.0}, "uce": {"ridge": 1e-4}}[refine]
    deltas = Trace(TraceConfig(refine=refine, eta=1.0, **settings)).refine(ctx)["cat"]
    empty, cat = wide.encode([""]), wide.encode(["a photo of a cat"])
    for site in wide.text_sites():
        delta = to_dense(deltas[site.name]).double()
        moved, meant = (getattr(cond, site.reads).double().flatten(0, -2) @ delta.T for cond in (empty, cat))
        assert moved.norm() < 0.1 * meant.norm()


def test_a_concept_weighs_the_same_however_many_words_the_encoder_names(wide):
    """One word told and three named: as if what is held had four times the weight."""
    task = Words()
    concept = task.concept("cat").model_copy(update={"phrases": ("a cat", "a dog", "a red cat", "two cats")})
    named, held = (
        Trace(TraceConfig(eta=1.0, rank_error=0, **settings)).refine(
            RunContext(wide, (concept,), task, component=COMPONENT, shared=shared)
        )["cat"]
        for shared, settings in (({"told": {"cat": 0.25}}, {}), ({}, {"preserve_scale": 4.0, "caption_scale": 0.04}))
    )
    for site in wide.text_sites():
        mine, theirs = (to_dense(side[site.name]).double() for side in (named, held))
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("neutral", ["a red thing", ""])
@pytest.mark.parametrize("refine", ["eq1", "delta"])
def test_the_papers_refinements_are_of_one_vector_per_concept(wide, refine, neutral):
    """W' e_w = W e_u (Eq. 1) and W' e_w = W' e_u (Prop. 3.2) at every site, for two concepts at once, of rank 1 each."""
    task = Words()
    concepts = [task.concept(n).model_copy(update={"neutral": neutral, "phrases": (f"a {n}",)}) for n in ("cat", "dog")]
    ctx = RunContext(wide, tuple(concepts), task, component=COMPONENT)
    refined = Trace(TraceConfig(refine=refine, eta=1.0)).refine(ctx)
    for concept in concepts:
        name = concept.phrases[0]
        mine, goal = wide.encode([name]), wide.encode([neutral])
        at = wide.spans(name, concept.name)[0][-1]
        there = wide.spans(neutral, "thing")[0][-1] if neutral else at
        for site in wide.text_sites():
            w, u = (mine.pooled[0], goal.pooled[0]) if site.reads == "pooled" else (mine.tokens[0, at], goal.tokens[0, there])
            before = wide.weight(site.name).double()
            after = before + sum(to_dense(own[site.name]).double() for own in refined.values())
            want = (before if refine == "eq1" else after) @ u.double()
            assert (after @ w.double() - want).norm() < 1e-8 * (before @ (w - u).double()).norm()
            assert refined[concept.name][site.name].rank == 1


# Losses


def test_negative_target_and_weighted_error_by_hand():
    concept, neutral, prediction = doubles(3, 2, 2)
    target = negative_guidance(neutral, concept, neutral, 0.3)
    torch.testing.assert_close(target, 1.3 * neutral - 0.3 * concept, rtol=1e-12, atol=1e-12)
    assert torch.equal(negative_guidance(neutral, concept, neutral, 0.0), neutral)
    weight = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)
    total = sum(
        weight[i].item() * sum((prediction[i, j, k] - target[i, j, k]).item() ** 2 for j in (0, 1) for k in (0, 1)) / 4
        for i in range(3)
    )
    assert losses.weighted_error(prediction, target, weight).item() == pytest.approx(total / 3, rel=1e-12)


def test_drift_costs_most_at_the_noise():
    tau = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert losses.preserve_weight(tau, 2.0).tolist() == [3.0, 2.5, 1.0]


def test_presence_is_zero_at_neutral_and_one_at_the_concept():
    concept, neutral, other = doubles(4, 3, 2)
    between = neutral + 0.3 * (concept - neutral)
    for prediction, expected in ((neutral, 0.0), (concept, 1.0), (between, 0.3)):
        torch.testing.assert_close(losses.presence(prediction, concept, neutral), torch.full((4,), expected).double())
    direction = (concept - neutral).flatten(1)
    across = other.flatten(1)
    across = across - (across * direction).sum(1, keepdim=True) / direction.square().sum(1, keepdim=True) * direction
    sideways = losses.presence(concept + across.view_as(concept), concept, neutral)
    torch.testing.assert_close(sideways, torch.ones(4).double())
    assert losses.presence(other, neutral, neutral).isfinite().all()


def test_integration_counts_only_what_the_pair_adds():
    single = torch.tensor([[0.2, 0.5], [-1.0, 0.4]], dtype=torch.float64, requires_grad=True)
    assert losses.integration(torch.tensor([[0.1, 0.5], [-0.5, 0.0]], dtype=torch.float64), single).item() == 0
    pair = torch.tensor([[0.5, 0.1], [0.2, 0.4]], dtype=torch.float64, requires_grad=True)
    value = losses.integration(pair, single)
    assert value.item() == pytest.approx((0.3**2 + 0 + 0.2**2 + 0) / 4)  # a negative single counts as none
    value.backward()
    assert single.grad is None
    assert pair.grad.ne(0).tolist() == [[True, False], [True, False]]


# Windows and banks


def test_windows_and_their_direction():
    config = TraceConfig(tau0=0.3)
    tau = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    assert slots.late(config)(tau).tolist() == [0, 0, 1, 1, 1]
    assert slots.early(config)(tau).tolist() == [1, 1, 0, 0, 0]
    assert slots.full(config)(tau).tolist() == [1, 1, 1, 1, 1]
    soft = slots.soft(config)(tau)
    assert (soft.diff() > 0).all()
    assert soft[2].item() == pytest.approx(0.5)
    assert soft[0] < 1e-4
    assert soft[-1] > 1 - 1e-4


def test_late_leaves_out_the_noise_of_every_kind_of_model():
    late = slots.late(TraceConfig(tau0=0.15))
    assert late(ddpm_tau(torch.tensor([999, 900, 800, 0]))).tolist() == [0, 0, 1, 1]  # timesteps fall to the image
    assert late(flow_tau(torch.tensor([1.0, 0.9, 0.8, 0.0]))).tolist() == [0, 0, 1, 1]  # so do sigmas


@pytest.mark.parametrize(("window", "inside"), [("late", [True]), ("early", [False]), ("full", [False, True])])
def test_a_step_draws_from_its_window_only(context, window, inside):
    method = Trace(TraceConfig(**SMALL | {"window": window, "integration": "none", "tau0": 0.3}))
    ctx = context(("cat",))
    with method.student(ctx, {}) as (_, step, _):
        drawn = step.pools[0].sample(64, ctx.generator("draw"), step.weights[0])
        assert sorted(set((drawn.tau >= 0.3).tolist())) == inside
        assert {round(t, 3) for t in step.pools[0].tau.tolist()} == {0.0, 0.5}  # the pool itself holds all


def test_banks_have_one_adapter_for_each_concept_or_one_for_all(context):
    config, concepts = TraceConfig(rank=3), context().concepts
    assert slots.per_concept(concepts, config) == [slots.Adapter("cat", 3, (0,)), slots.Adapter("dog", 3, (1,))]
    assert slots.shared(concepts, config) == [slots.Adapter("shared", 3, (0, 1))]


@pytest.mark.parametrize("chosen", [*Trace.ablations.items(), *Trace.presets.items()], ids=lambda pair: pair[0])
def test_ablations_and_presets_are_valid_and_differ_from_the_default(chosen):
    config, plain = TraceConfig(**chosen[1]), TraceConfig()
    assert config != plain
    for slot, choices in SLOTS.items():
        assert getattr(config, slot) in choices


def test_every_choice_of_a_slot_is_there():
    for slot, choices in SLOTS.items():
        for name, (attribute, _) in choices.items():
            assert default().components.get(slot, name) is getattr(slots, attribute)


# Pools


def test_predictions_of_clean_pools_are_the_teachers(backbone, prompts):
    cond, empty = backbone.encode(["a photo of a ship", "red"]), backbone.encode([""])
    pool = clean_pool(backbone, PROTOCOL, cond, SEEDS)
    assert len(pool) == STEPS * len(SEEDS)
    with torch.no_grad():
        fresh = backbone.predict(pool.x, pool.tau, pool.cond[pool.row])
    torch.testing.assert_close(pool.predictions[:, 0], fresh, rtol=1e-4, atol=1e-5)
    used = pool.row.bincount(minlength=3).tolist()
    assert used[2] == -(-len(pool) // 5)  # one in five is the empty prompt
    assert torch.equal(pool.cond.tokens[2], empty.tokens[0])


def test_predictions_of_target_pools_are_the_teachers(backbone, prompts):
    concepts, neutrals = (backbone.encode([f"a photo of a {w}", w]) for w in ("cat", "thing"))
    pool = target_pool(backbone, PROTOCOL, concepts, neutrals, SEEDS, **TURN)
    with torch.no_grad():
        with_concept, without = (backbone.predict(pool.x, pool.tau, c[pool.row]) for c in (concepts, neutrals))
    expected = torch.stack([with_concept, without, 1.5 * without - 0.5 * with_concept], 1)
    torch.testing.assert_close(pool.predictions, expected, rtol=1e-4, atol=1e-5)
    assert set(pool.row.tolist()) == {0, 1}


def test_predictions_of_pair_pools_are_the_teachers(backbone, prompts):
    both = backbone.encode(["a photo of a cat by a dog"])
    pool = pair_pool(backbone, PROTOCOL, [both, prompts["cat"], prompts["dog"]], prompts["thing"], SEEDS)
    with torch.no_grad():
        fresh = [backbone.predict(pool.x, pool.tau, prompts[w].repeat(len(pool))) for w in ("cat", "dog", "thing")]
    torch.testing.assert_close(pool.predictions, torch.stack(fresh, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(pool.cond.tokens, torch.cat([both.tokens, prompts["cat"].tokens, prompts["dog"].tokens]))


def test_semi_target_trajectories_leave_the_concepts_own_at_tau0(backbone, prompts):
    semi = target_pool(backbone, PROTOCOL, prompts["cat"], prompts["thing"], SEEDS, **TURN)
    own = target_pool(backbone, PROTOCOL, prompts["cat"], prompts["cat"], SEEDS, **TURN)  # c_w in the place of c_u
    schedule = backbone.schedule(STEPS)
    turn = schedule.first_late(TAU0)
    assert 0 < turn < STEPS - 1
    for k in range(STEPS):
        at = slice(k * len(SEEDS), (k + 1) * len(SEEDS))
        assert semi.tau[at].tolist() == pytest.approx([schedule.tau[k].item()] * len(SEEDS), abs=1e-6)
        # The step at index `turn` is the first under y*, so the latents differ from the next one on.
        assert torch.equal(semi.x[at], own.x[at]) == (k <= turn), k


def test_the_concepts_own_trajectory_is_guided_sampling(backbone, prompts):
    empty = backbone.encode([""])
    own = target_pool(backbone, PROTOCOL, prompts["cat"], prompts["cat"], SEEDS, **TURN)
    schedule, x = backbone.schedule(STEPS), backbone.latents(SEEDS)
    for k in range(STEPS):
        torch.testing.assert_close(own.x[k * len(SEEDS) : (k + 1) * len(SEEDS)], x, rtol=1e-4, atol=1e-4)
        tau = schedule.tau[k].float().expand(len(x))
        with torch.no_grad():
            direction = guided(backbone, x, tau, prompts["cat"].repeat(len(x)), uncond=empty, scale=GUIDANCE)
        x = backbone.step(direction, x, k, schedule)


def test_samples_carry_their_own_prompts(backbone):
    cond = backbone.encode(["a photo of a ship", "red"])
    pool = clean_pool(backbone, PROTOCOL, cond, SEEDS)
    drawn = pool.sample(8, torch.Generator().manual_seed(0))
    assert len(drawn) == len(drawn.cond) == 8
    with torch.no_grad():
        fresh = backbone.predict(drawn.x, drawn.tau, drawn.cond[drawn.row])
    torch.testing.assert_close(drawn.predictions[:, 0], fresh, rtol=1e-4, atol=1e-5)


# Steps


@pytest.mark.parametrize("bank", ["per-concept", "shared"])
def test_every_loss_trains_the_adapter_in_turn_and_no_other(context, bank):
    method = Trace(TraceConfig(**SMALL | {"bank": bank, "divergence": ("probe",)}))
    ctx = context()
    with method.student(ctx, {}) as (adapters, step, parameters):
        generator = ctx.generator("noise")
        with torch.no_grad():  # away from the start, where the student is the teacher
            for p in parameters:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        owner = {0: "cat", 1: "dog"} if bank == "per-concept" else {0: "shared", 1: "shared"}
        moved: dict[str, set[int]] = {}
        for batch in range(16):
            turn = batch % 2
            for name in step(batch, ctx.generator(f"batch/{batch}")):
                # One graph for each term: what a term reaches must not depend on the others.
                value = step(batch, ctx.generator(f"batch/{batch}"))[name]
                own = adapters.train_only(owner[turn])
                grads = torch.autograd.grad(value, own, allow_unused=True)
                if any(g is not None and g.abs().sum() > 0 for g in grads):
                    moved.setdefault(name, set()).add(turn)
            others = [p for p in parameters if all(p is not q for q in own)]
            assert not any(p.requires_grad for p in others)
            assert not any(p.requires_grad for n, p in ctx.backbone.denoiser.named_parameters() if "lora_" not in n)
            if len(moved) == 4 and all(len(turns) == 2 for turns in moved.values()):
                break
        # The integration loss is zero wherever the pair adds nothing, so several batches may be needed.
        assert moved == {name: {0, 1} for name in ("erase", "preserve", "probe", "integration")}


def test_a_fresh_student_is_the_teacher(context):
    """Without a refinement nothing has drifted yet, and the whole error is the distance from f(c_w) to y*."""
    ctx = context(("cat",))
    method = Trace(TraceConfig(**SMALL | {"integration": "none"}))
    with method.student(ctx, {}) as (_, step, _):
        parts = step(0, ctx.generator("x"))
        drawn = step.pools[0].sample(3, ctx.generator("x"), step.weights[0])
        gap = (drawn.predictions[:, 0] - drawn.predictions[:, 2]).double().square().mean()
        assert parts["preserve"].item() < 1e-8
        assert parts["erase"].item() == pytest.approx(gap.item(), rel=1e-3)


def test_probe_tells_concept_from_neutral_and_has_a_gradient(backbone, context, prompts):
    ctx = context(("cat",))
    pool = target_pool(backbone, PROTOCOL, prompts["cat"], prompts["thing"], SEEDS * 4, **TURN)
    divergence = probe(ctx, ctx.concepts[0], pool)
    with_concept, without = (backbone.to_x0(pool.predictions[:, k], pool.x, pool.tau) for k in (0, 1))
    x0 = with_concept.clone().requires_grad_()
    value = divergence(x0, without)
    value.backward()
    assert 0 < value.item() < 1
    assert x0.grad.abs().sum() > 0
    assert value > divergence(without, without)


# Whole erasures


@pytest.mark.parametrize("bank", ["per-concept", "shared"])
def test_an_erasure_of_two_concepts(backbone, context, tmp_path, bank):
    before = {key: value.clone() for key, value in backbone.denoiser.state_dict().items()}
    erasure = Trace(TraceConfig(**SMALL | {"bank": bank})).erase(context())
    after = backbone.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    parts = {name: sorted(own) for name, own in erasure.deltas.items()}
    if bank == "per-concept":
        assert parts == {"cat": ["adapter", "refine"], "dog": ["adapter", "refine"]}
    else:
        assert parts == {"cat": ["refine"], "dog": ["refine"], "shared": ["adapter"]}
    for own in erasure.deltas.values():
        for deltas in own.values():
            assert any(to_dense(d).abs().max() > 0 for d in deltas.values())
    erasure.save(tmp_path / "erasure")
    loaded = Erasure.load(tmp_path / "erasure", backbone)
    assert loaded.method == "trace"
    assert TraceConfig(**loaded.config) == TraceConfig(**erasure.config)
    assert parts == {name: sorted(own) for name, own in loaded.deltas.items()}
    for name, part in ((name, part) for name, own in parts.items() for part in own):
        mine, theirs = erasure.deltas[name][part], loaded.deltas[name][part]
        assert mine.keys() == theirs.keys()
        for module in mine:
            torch.testing.assert_close(to_dense(theirs[module]).double(), to_dense(mine[module]).double(), rtol=1e-4, atol=1e-6)


def test_the_adapters_of_two_concepts_do_not_grow_against_each_other(context):
    """Were both active in every step, each would take back what the other did: both would grow, and their sum stand still."""
    erasure = Trace(TraceConfig(**SMALL | {"steps": 60, "lr": 0.01, "refine": "none"})).erase(context())
    cat, dog = ({m: to_dense(d).double() for m, d in erasure.deltas[name]["adapter"].items()} for name in ("cat", "dog"))
    cat_norm, dog_norm, both = (
        torch.cat([delta.flatten() for delta in deltas]).norm()
        for deltas in (cat.values(), dog.values(), [cat[module] + dog[module] for module in cat])
    )
    assert both > 0.9 * max(cat_norm, dog_norm)


@pytest.mark.parametrize("bank", ["per-concept", "shared"])
def test_stages_of_robustify_see_the_adapters_and_change_the_closed_form_alone(context, bank):
    config = TraceConfig(**SMALL | {"bank": bank, "robustify": "rece"})
    plain = Trace(config.model_copy(update={"robustify": ()})).erase(context()).deltas
    adapters = {f"adapter of {name}": own["adapter"] for name, own in plain.items() if "adapter" in own}
    want = robustify(context(), {**{name: plain[name]["refine"] for name in ("cat", "dog")}, **adapters}, config)
    found = Trace(config).erase(context()).deltas
    assert {name: list(own) for name, own in found.items()} == {name: list(own) for name, own in plain.items()}
    for name, own in plain.items():
        for part, deltas in own.items():
            for module, delta in (want[name] if part == "refine" else deltas).items():
                torch.testing.assert_close(to_dense(found[name][part][module]), to_dense(delta), rtol=1e-6, atol=1e-8)
    moved = (to_dense(found["cat"]["refine"][module]) - to_dense(plain["cat"]["refine"][module]) for module in want["cat"])
    assert all(change.abs().max() > 1e-4 for change in moved)


def test_a_seed_decides_every_byte(context, tmp_path):
    method = Trace(TraceConfig(**SMALL))
    hashes = [method.erase(context(seed=seed)).save(tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_without_steps_there_is_the_closed_form_alone(context):
    erasure = Trace(TraceConfig(**SMALL | {"steps": 0})).erase(context())
    assert {name: list(own) for name, own in erasure.deltas.items()} == {"cat": ["refine"], "dog": ["refine"]}
