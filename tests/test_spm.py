"""SPM: its random encodings, its losses against plain formulas, and what training does to them."""

import math

import numpy as np
import pytest
import torch

from erasekit.backbones.protocol import guided
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit_spm.anchors import random_anchors, random_like
from erasekit_spm.method import Anchored, Spm, SpmConfig
from tests.third_party.tiny_world import Words


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def f64(tensor):
    return tensor.detach().double().numpy()


@pytest.fixture
def bank(ctx):
    """An adapter of the cat that is away from its start, where a student is its teacher."""
    with AdapterBank(ctx.backbone) as bank:
        bank.add("cat", Spm(SpmConfig()).layers(ctx), 1, ctx.generator("init"))
        for p in bank.train_only("cat"):
            p.data.add_(0.05 * torch.randn(p.shape, generator=ctx.generator(str(p.shape))))
        yield bank


# Random encodings


def test_random_encodings_keep_the_norm_and_keep_away():
    """In two dimensions the angle has the density min(1, 1 - cos): its mean cosine is that of an integral."""
    target, generator = torch.tensor([3.0, -4.0]), seeded()
    drawn = torch.stack([random_like(target, generator) for _ in range(4000)]).double()
    norms = drawn.norm(dim=1) / 5
    assert norms.min() >= 0.8 - 1e-6
    assert norms.max() <= 1.2 + 1e-6
    assert norms.mean() == pytest.approx(1, abs=0.01)
    cosines = (drawn @ target.double()) / (5 * drawn.norm(dim=1))
    assert cosines.mean() == pytest.approx(-(math.pi / 2) / (2 * math.pi - 2), abs=0.03)


def test_each_prompt_gets_a_random_encoding_of_its_own(backbone):
    asked = backbone.encode(["a cat", "a dog"])[[0, 0, 1]]
    found = random_anchors(asked, seeded())
    assert torch.equal(found.tokens, random_anchors(asked, seeded()).tokens)
    for name in ("tokens", "pooled"):
        mine, theirs = getattr(found, name), getattr(asked, name)
        if theirs is None:
            assert mine is None
            continue
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        ratio = mine.flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
        assert ((ratio > 0.79) & (ratio < 1.21)).all()
        assert not torch.allclose(mine[0], mine[1])
    assert torch.equal(found.lengths, asked.lengths)


# The losses


@pytest.mark.parametrize("anchor", ["empty", "neutral"])
def test_losses_and_gradient_are_those_of_the_formula(ctx, bank, anchor):
    config, backbone, predict = SpmConfig(anchor=anchor, eta=0.7, anchoring=30.0, anchors=2, batch=2), ctx.backbone, ctx.predict
    losses = Anchored(config, ctx, bank, ctx.concepts[0])
    found = losses(0, seeded(5))
    generator = seeded(5)
    x, tau, _ = losses.points(generator)
    asked, start = (backbone.encode([text] * 2) for text in ("cat", "thing" if anchor == "neutral" else ""))
    many = torch.tensor([0, 0, 1, 1])
    others = random_anchors(asked[many], generator)
    with torch.no_grad(), bank.teacher():
        neutral, concept, held = (f64(predict(x[i], tau[i], c)) for i, c in (([0, 1], start), ([0, 1], asked), (many, others)))
    near, far = predict(x, tau, asked), predict(x[many], tau[many], others)
    gap, drift = f64(near) - (neutral - 0.7 * (concept - neutral)), f64(far) - held
    assert found["erase"].item() == pytest.approx((gap**2).mean(), rel=1e-4)
    assert found["anchor"].item() == pytest.approx(30 * (drift**2).mean(), rel=1e-4)
    parameters = bank.train_only("cat")
    slopes = [torch.from_numpy(s).to(near) for s in (2 * gap / gap.size, 60 * drift / drift.size)]
    wanted = torch.autograd.grad([near, far], parameters, slopes)
    mine = torch.autograd.grad(sum(found.values()), parameters)
    scale = max(float(w.abs().max()) for w in wanted)
    assert scale > 0
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_points_are_the_students_own_and_none_is_noise(ctx, bank):
    losses, schedule = Anchored(SpmConfig(batch=2), ctx, bank, ctx.concepts[0]), ctx.backbone.schedule(4, 16)
    drawn = [losses.points(seeded(seed)) for seed in range(12)]
    assert {float(tau[0]) for _, tau, _ in drawn} == set(schedule.tau[1:].tolist())
    x, tau, rows = next(point for point in drawn if point[1][0] == schedule.tau[2])
    generator = seeded([float(point[1][0]) for point in drawn].index(float(schedule.tau[2])))
    torch.randint(1, (2,), generator=generator)
    by_hand = ctx.backbone.latents(torch.randint(2**31, (2,), generator=generator).tolist(), 16)
    empty, asked = ctx.backbone.encode([""]), losses.asked[rows]
    with torch.no_grad():
        for k in range(2):
            at = schedule.tau[k].expand(2)
            followed = guided(ctx.backbone, by_hand, at, asked, uncond=empty, scale=losses.protocol.guidance)
            by_hand = ctx.backbone.step(followed, by_hand, k, schedule)
    torch.testing.assert_close(x, by_hand, rtol=1e-5, atol=1e-6)
    assert losses.protocol.guidance == (ctx.protocol.guidance if ctx.backbone.embedded_guidance else 3.0)
    with bank.teacher():
        base, _, _ = losses.points(seeded([float(point[1][0]) for point in drawn].index(float(tau[0]))))
    assert not torch.allclose(x, base), "the trajectory is not the student's"


# The method


def test_adapters_are_on_all_linear_layers_of_the_blocks(ctx):
    layers = Spm(SpmConfig()).layers(ctx)
    rest = sorted(set(ctx.backbone.lora_targets("all")) - set(layers))
    if ctx.backbone.prefix == "unet":
        assert {name.split(".transformer_blocks.")[1] for name in layers if ".transformer_blocks." in name} >= {
            *(f"0.attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
            "0.ff.net.0.proj",
            "0.ff.net.2",
        }
        assert not [name for name in rest if "attentions" in name]
    else:
        assert {name for name in rest if "transformer_blocks" in name} == {n for n in rest if ".norm" in n and ".linear" in n}
        assert "single_transformer_blocks.0.proj_mlp" in layers
    assert Spm(SpmConfig(scope="all")).layers(ctx) == ctx.backbone.lora_targets("all")


def test_training_lowers_the_loss_and_anchoring_holds_the_rest(backbone):
    """With a weight on random encodings the model moves less under them, by a half at least."""

    def trained(anchoring):
        task, seen = Words(), []
        ctx = RunContext(backbone, (task.concept("cat"),), task, log=lambda step, total, values: seen.append(values["erase"]))
        ctx.protocol = ctx.protocol.model_copy(update={"steps": 4})
        config = SpmConfig(steps=25, lr=1e-2, warmup=0, batch=2, anchors=2, anchoring=anchoring, bare=False)
        deltas = Spm(config).erase(ctx).deltas["cat"]["adapter"]
        with AdapterBank(backbone) as bank:
            bank.add_frozen("cat", deltas)
            losses = Anchored(config.model_copy(update={"anchoring": 1.0, "anchors": 8}), ctx, bank, ctx.concepts[0])
            with torch.no_grad():
                drift = losses(0, seeded(9))["anchor"].item()
        return seen, drift

    (free, moved), (_, held) = trained(0.0), trained(30.0)
    assert sum(free[-5:]) < 0.8 * sum(free[:5])
    assert held < 0.5 * moved


def test_each_adapter_is_trained_alone(backbone):
    task, on = Words(), []
    concepts = tuple(task.concept(name) for name in ("cat", "dog"))
    ctx = RunContext(backbone, concepts, task, log=lambda *_: on.append(len(backbone.denoiser.peft_config)))
    erasure = Spm(SpmConfig(steps=2, anchors=1)).erase(ctx)
    assert on == [1] * 4
    assert set(erasure.deltas) == {"cat", "dog"}
    ranks = {delta.rank for deltas in erasure.deltas.values() for delta in deltas["adapter"].values()}
    assert ranks == {1}


@pytest.mark.parametrize(("settings", "rows"), [({}, 5), ({"anchoring": 0.0}, 1), ({"batch": 2, "anchors": 3}, 8)])
def test_the_footprint_is_what_is_predicted_with_gradients(ctx, bank, settings, rows):
    method, seen = Spm(SpmConfig(**settings)), []
    assert method.footprint(ctx).rows == rows
    assert Spm(SpmConfig(steps=0)).footprint(ctx).rows == 0

    def count(module, arguments, named):
        if torch.is_grad_enabled():
            seen.append(len(arguments[0] if arguments else named["hidden_states"]))

    hook = ctx.backbone.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    Anchored(method.config, ctx, bank, ctx.concepts[0])(0, seeded())
    hook.remove()
    assert sum(seen) == rows


def test_defaults_are_the_published_run_but_for_its_restarts():
    assert np.isclose(SpmConfig().lr, 1e-4)
    assert Spm.presets["official"] == SpmConfig().model_dump()
    assert Spm.ablations["without anchoring"] == {"anchoring": 0.0}
