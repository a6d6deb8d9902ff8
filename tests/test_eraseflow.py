"""EraseFlow: its random steps against Bayes' rule, its loss against plain formulas, its memory, and what training does."""

import math

import numpy as np
import pytest
import torch

from erasekit.errors import UsageError
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import concept_pairs
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit_eraseflow.method import LOG_Z, Balanced, EraseFlow, EraseFlowConfig
from erasekit_eraseflow.transitions import log_density, mean_of, rates_of
from tests.conftest import THIRD_PARTY
from tests.third_party.tiny_world import Words

REGISTRIES = plugins.load([THIRD_PARTY / "tiny_world.py"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def f64(tensor):
    return tensor.detach().double().numpy()


def scope(backbone):
    return "attention" if backbone.prefix == "unet" else "all_attn"


@pytest.fixture
def bank(ctx):
    """A LoRA of the cat that is away from its start."""
    with AdapterBank(ctx.backbone) as bank:
        bank.add("cat", ctx.backbone.lora_targets(scope(ctx.backbone)), 2, ctx.generator("init"))
        for p in bank.train_only("cat"):
            p.data.add_(0.1 * torch.randn(p.shape, generator=ctx.generator(str(p.shape))))
        yield bank


def balanced(ctx, bank, **settings):
    return Balanced(EraseFlowConfig(**settings), ctx, bank, ctx.concepts[0])


# Random steps


def rates_by_hand(backbone, schedule):
    """The rates of signal and noise of every step, and of the image, in float64."""
    if backbone.prefix == "unet":
        alphas = backbone.pipeline().scheduler.alphas_cumprod.double()
        a = torch.cat([alphas[schedule.timesteps], alphas[:1]])
        return a.sqrt().tolist(), (1 - a).sqrt().tolist()
    sigmas = [*(1 - schedule.tau.double()).tolist(), 0.0]
    return [1 - s for s in sigmas], sigmas


def test_a_step_at_eta_1_is_the_reverse_of_the_noising(backbone):
    """By Bayes: x' | x, x0 has the precisions of N(x'; a' x0, s') and of N(x; r x', added) together."""
    schedule = backbone.schedule(5, 16)
    signal, noise = rates_by_hand(backbone, schedule)
    found = rates_of(backbone, schedule)
    assert len(found) == (5 if backbone.prefix == "unet" else 4)
    x = backbone.latents([0, 1], 16)
    prediction = torch.randn(x.shape, generator=seeded())
    for k, rates in enumerate(found):
        np.testing.assert_allclose(rates, (signal[k], noise[k], signal[k + 1], noise[k + 1]), rtol=1e-5, atol=1e-7)
        r = signal[k] / signal[k + 1]
        added = math.sqrt(noise[k] ** 2 - (r * noise[k + 1]) ** 2)
        precision = 1 / noise[k + 1] ** 2 + r**2 / added**2
        tau = schedule.tau[k].expand(2)
        x0 = f64(backbone.to_x0(prediction, x, tau))
        mean = (signal[k + 1] * x0 / noise[k + 1] ** 2 + r * f64(x) / added**2) / precision
        assert rates.added == pytest.approx(added, rel=1e-4)
        assert rates.drawn(1.0) == pytest.approx(precision**-0.5, rel=1e-4)
        assert rates.drawn(0.5) == pytest.approx(0.5 * precision**-0.5, rel=1e-4)
        mine = f64(mean_of(backbone, prediction, x, tau, rates, 1.0))
        np.testing.assert_allclose(mine, mean, rtol=1e-3, atol=1e-4 * np.abs(mean).max())


def test_a_step_without_noise_would_be_the_samplers_own(backbone):
    """As eta goes to 0, what is left is the deterministic step that the pipeline takes."""
    schedule = backbone.schedule(5, 16)
    x = backbone.latents([0, 1], 16)
    prediction = torch.randn(x.shape, generator=seeded())
    for k, rates in enumerate(rates_of(backbone, schedule)):
        mine = mean_of(backbone, prediction, x, schedule.tau[k].expand(2), rates, 1e-6)
        theirs = backbone.step(prediction, x, k, schedule)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_log_densities_are_those_of_torch():
    x, mean = (torch.randn(3, 2, 4, generator=seeded(s), dtype=torch.float64) for s in (0, 1))
    wanted = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(log_density(x, mean, 0.3), wanted)


# The loss


def test_the_loss_and_its_gradient_are_those_of_the_formula(ctx, bank):
    """All in float64 from the predictions: e for the empty prompt, c for the concept's, f = e + 5 (c - e)."""
    losses = balanced(ctx, bank, batch=2, eta=0.8, others=0.5, last=0.5, log_beta=1.5)
    found = losses(0, seeded(3))["balance"]
    generator, backbone = seeded(3), ctx.backbone
    path, rows = losses.drawn(generator)
    chosen = losses.chosen(generator)
    assert 1 < len(chosen) < len(losses.rates)
    schedule = backbone.schedule(4, 16)
    signal, noise = rates_by_hand(backbone, schedule)
    pairs = concept_pairs(ctx.concepts[0], ctx.prompts("erase"))
    empty, asked = backbone.encode([""]).repeat(2), backbone.encode([pairs[row][0] for row in rows])
    scale = ctx.protocol.guidance if backbone.embedded_guidance else 5.0
    total, outputs, slopes = np.full(2, LOG_Z - 1.5), [], []
    for k in chosen:
        x, y, tau = f64(path[k]), f64(path[k + 1]), schedule.tau[k].expand(2)
        e, c = (backbone.predict(path[k], tau, text, guidance=ctx.protocol.guidance) for text in (empty, asked))
        f = f64(c) if backbone.embedded_guidance else f64(e) + 5 * (f64(c) - f64(e))
        a, s, b, t = signal[k], noise[k], signal[k + 1], noise[k + 1]
        added = math.sqrt(s**2 - (a / b * t) ** 2)
        deviation = 0.8 * t * added / s
        rest = math.sqrt(t**2 - deviation**2)
        if backbone.prefix == "unet":
            mean, slope = b * (x - s * f) / a + rest * f, -b * s / a + rest
        else:
            mean, slope = b * (x - s * f) + rest * (x - a * (x - s * f)) / s, -b * s + rest * a
        dims = x[0].size
        forward = -((y - mean) ** 2) / (2 * deviation**2) - math.log(deviation) - math.log(2 * math.pi) / 2
        backward = -((x - a / b * y) ** 2) / (2 * added**2) - math.log(added) - math.log(2 * math.pi) / 2
        total += (forward - backward).reshape(2, -1).mean(1)
        pull = (y - mean) / deviation**2 * slope / dims
        shares = [(c, 1.0)] if backbone.embedded_guidance else [(c, scale), (e, 1 - scale)]
        for output, share in shares:
            outputs.append(output)
            slopes.append(share * pull)
    assert found.item() == pytest.approx((total**2).mean(), rel=1e-3)
    parameters = bank.train_only("cat")
    weight = (2 * total / 2).reshape(2, *[1] * (path[0].dim() - 1))
    wanted = torch.autograd.grad(outputs, parameters, [torch.from_numpy(weight * s).to(path[0]) for s in slopes])
    mine = torch.autograd.grad(found, [*parameters, losses.log_z])
    assert mine[-1].item() == pytest.approx(2 * total.mean(), rel=1e-3)
    largest = max(float(w.abs().max()) for w in wanted)
    assert largest > 0
    for one, other in zip(mine, wanted, strict=False):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * largest)


def test_the_gradient_is_that_of_one_graph_over_all_steps_without_holding_it(ctx, bank):
    losses = balanced(ctx, bank, batch=2)
    path, rows = losses.drawn(seeded(1))
    steps, cond, parameters = range(len(losses.rates)), losses.asked[rows], bank.train_only("cat")

    def whole():
        return sum(losses.step_ratio(k, path[k], path[k + 1], cond) for k in steps)

    def held(ratio):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = (ratio() - 3).square().mean()
        return sum(sizes), loss.item(), torch.autograd.grad(loss, parameters)

    much, value, wanted = held(whole)
    little, same, mine = held(lambda: losses.log_ratio(path, cond, steps))
    assert same == pytest.approx(value, rel=1e-6)
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert little < 0.01 * much
    assert little < path[0].numel()


# Trajectories


def test_trajectories_are_the_students_or_the_bases(ctx, bank):
    fresh, kept = balanced(ctx, bank), balanced(ctx, bank, fresh=False, accumulate=2)
    (path, _), (again, _), (other, _) = (fresh.trajectories(0, seeded(s)) for s in (4, 4, 5))
    assert all(torch.equal(x, y) for x, y in zip(path, again, strict=True))
    assert not torch.allclose(path[0], other[0])
    with bank.teacher():
        base, _ = fresh.trajectories(0, seeded(4))
    assert torch.equal(base[0], path[0])
    assert not torch.allclose(base[1], path[1]), "the trajectory is not the student's"
    first, third, second = (kept.trajectories(batch, seeded(batch))[0] for batch in (0, 2, 1))
    assert first is third
    assert not torch.allclose(first[0], second[0])
    later = balanced(ctx, bank, fresh=False, accumulate=2)  # as a run that goes on from a checkpoint
    for p in bank.train_only("cat"):
        p.data += 0.1
    assert all(torch.equal(x, y) for x, y in zip(later.trajectories(6, seeded())[0], first, strict=True))


def test_a_trajectory_has_the_noise_that_its_density_says(ctx, bank):
    """Under its own prompt the deviations of a path from its means are standard normal."""
    losses = balanced(ctx, bank, batch=32)
    path, rows = losses.drawn(seeded())
    with torch.no_grad():
        for k, rates in enumerate(losses.rates):
            z = (path[k + 1] - losses.mean(k, path[k], losses.neutral[rows])) / rates.drawn(1.0)
            assert z.mean().abs() < 0.05
            assert z.std() == pytest.approx(1, abs=0.05)


def test_the_last_steps_count_and_some_of_those_before(ctx, bank):
    losses = balanced(ctx, bank)
    losses.rates = losses.rates[:1] * 50
    drawn = [losses.chosen(seeded(s)) for s in range(40)]
    assert all(len(steps) == 20 and steps[10:] == list(range(40, 50)) for steps in drawn)
    assert {step for steps in drawn for step in steps} == set(range(50))
    losses.config = EraseFlowConfig(others=1.0)
    assert losses.chosen(seeded()) == list(range(50))
    losses.config = EraseFlowConfig(others=0.0, last=0.0)
    assert losses.chosen(seeded()) == [49]


# The method


def test_training_lowers_the_loss_and_makes_the_anchors_path_likelier(backbone):
    task, seen = Words(), []
    ctx = RunContext(backbone, (task.concept("cat"),), task, log=lambda step, total, values: seen.append(values["balance"]))
    ctx.protocol = ctx.protocol.model_copy(update={"steps": 4})
    config = EraseFlowConfig(
        steps=12, lr=1e-2, rank=4, scope=scope(backbone), others=1.0, batch=2, log_beta=30.0, fresh=False, guidance=None
    )
    deltas = EraseFlow(config).erase(ctx).deltas["cat"]["adapter"]
    assert sum(seen[-3:]) < sum(seen[:3])
    with AdapterBank(backbone) as bank, torch.no_grad():
        bank.add_frozen("cat", deltas)
        losses = Balanced(config, ctx, bank, ctx.concepts[0])
        path, rows = losses.trajectories(0, seeded())

        def likely():
            return losses.log_ratio(path, losses.asked[rows], range(len(losses.rates))).mean().item()

        after = likely()
        with bank.teacher():
            before = likely()
    assert after > before


@pytest.mark.parametrize("fresh", [True, False])
def test_a_training_that_was_stopped_goes_on_to_the_same_erasure(backbone, fresh, tmp_path):
    def erased(steps, folder):
        task = Words()
        ctx = RunContext(backbone, (task.concept("cat"),), task, directory=folder)
        config = EraseFlowConfig(steps=steps, lr=1e-2, rank=2, scope=scope(backbone), fresh=fresh, checkpoint_every=1)
        return EraseFlow(config).erase(ctx).deltas["cat"]["adapter"]

    whole = erased(3, tmp_path / "whole")
    erased(2, tmp_path / "parts")
    for layer, delta in erased(3, tmp_path / "parts").items():
        assert torch.equal(delta.up, whole[layer].up), layer


def planned(backbone, *overrides):
    flags = {"method": "eraseflow", "backbone": backbone, "task": "words", "concepts": ("cat",)}
    return resolve(build(flags, overrides=[*overrides, "backbone.device=cpu"]), REGISTRIES)


@pytest.mark.parametrize(("name", "rows"), [("tiny", 2), ("tiny-flux", 1)])
def test_the_footprint_is_a_step_with_both_predictions_of_guidance(name, rows, tiny_folder, tiny_flux_folder):
    folder = {"tiny": tiny_folder, "tiny-flux": tiny_flux_folder}[name]
    plan = planned(name, f"backbone.path={folder}", "method.batch=3")
    assert plan.method(plan.method_config).footprint(plan).rows == 3 * rows
    with pytest.raises(UsageError, match="needs steps that leave noise"):
        planned(name, f"backbone.path={folder}", "protocol.steps=1")


def test_defaults_are_the_published_runs():
    sd, style, flux = (EraseFlow.presets[name] for name in ("official", "official-style", "flux"))
    assert sd == EraseFlowConfig().model_dump(exclude={"scope"})
    assert {key for key in sd if sd[key] != style[key]} == {"lr", "fresh"}
    assert flux["eta"] == pytest.approx(0.7 / math.sqrt(2), abs=1e-3)
    assert EraseFlow.defaults["dit"].items() <= (flux | {"scope": "all_attn"}).items()
