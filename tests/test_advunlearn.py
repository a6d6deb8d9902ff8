"""AdvUnlearn: what its attack finds, and its loss against a plain formula."""

import pytest
import torch

from erasekit.attacks.tokens import random_tokens, read_soft
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import concept_pairs
from erasekit.methods.students import whole
from erasekit.methods.trajectories import base_pool
from erasekit_advunlearn.method import AdvUnlearn, AdvUnlearnConfig
from tests.third_party.tiny_world import Words


@pytest.fixture
def made(backbone):
    """A method with its context, a student, and what it asks for; the student's weights are not the base's."""

    def make(**settings):
        task = Words()
        ctx = RunContext(backbone, (task.concept("cat"),), task)
        ctx.protocol = ctx.protocol.model_copy(update={"steps": 4})
        scope = "kv" if backbone.capabilities.family == "unet" else "text"
        small = {"trajectories": 3, "kept_trajectories": 3, "batch": 3, "kept_batch": 4, "guidance": None, "scope": scope}
        method = AdvUnlearn(AdvUnlearnConfig(**small | settings))
        student = whole(ctx, backbone.lora_targets(scope))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in student.parameters:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
        return method, ctx, student, method.asked(ctx, ctx.concepts[0])

    return make


def test_the_prefix_stands_before_the_prompt_and_brings_the_concept_nearer(made):
    method, ctx, student, asked = made(attack_steps=12, attack_lr=0.05)
    row = int(asked.pool.row[0])
    at = asked.pool.sample(3, torch.Generator().manual_seed(1), asked.pool.row == row)
    errors = []
    for steps in (1, 12):
        other = AdvUnlearn(method.config.model_copy(update={"attack_steps": steps, "attack_lr": 0.05 if steps > 1 else 1e-9}))
        cond = other.attack(ctx, student, asked.slots[row], at, asked.cond[[row]], torch.Generator().manual_seed(2))
        with torch.no_grad():
            prediction = student.predict(at.x, at.tau, cond.repeat(3))
        errors.append(float((prediction - at.predictions[:, 0]).square().mean()))
    assert errors[1] < errors[0]
    for name, own in asked.slots[row].items():
        assert own.at.tolist() == [own.lexicon.begin], name
        plain = ctx.backbone.tokenize([_prompts(method, ctx)[row]])[name][0].tolist()
        assert own.ids[0, own.lexicon.begin + 1 :].tolist()[:3] == plain[own.lexicon.begin :][:3]


def _prompts(method, ctx):
    pairs = concept_pairs(ctx.concepts[0], ctx.prompts("erase"))
    return [text for text, _ in method._drawn(ctx, ctx.concepts[0].name, pairs, method.config.trajectories)[0]]


def test_prompts_are_drawn_from_all_of_them(made):
    """The first ones would be of one or two things that must stay."""
    method, ctx, _, _ = made()
    few, seeds = method._drawn(ctx, "", range(100), 10)
    assert len(set(few)) == len(seeds) == 10
    assert max(few) > 50
    everything, seeds = method._drawn(ctx, "", range(100), 150)
    assert sorted(everything) == list(range(100))
    assert len(set(seeds)) == 150
    kept = method._kept(ctx)
    assert set(kept.row.tolist()) == set(range(len(kept.cond)))


@pytest.mark.parametrize("plain_steps", [1, 0])
def test_the_loss_is_esds_under_the_prefix_and_the_bases_on_what_is_preserved(made, plain_steps):
    method, ctx, student, asked = made(plain_steps=plain_steps, attack_steps=2, eta=0.5, retain=0.25)
    kept = base_pool(ctx.backbone, ctx.protocol, ctx.backbone.encode(["a photo of a dog"]), [4])
    found = method.losses(ctx, student, [asked], kept, 0, torch.Generator().manual_seed(3))

    g = torch.Generator().manual_seed(3)  # the same draws again, in the same order
    rows = asked.pool.row.unique()
    row = int(rows[torch.randint(len(rows), (1,), generator=g)])
    at, keep = asked.pool.sample(3, g, asked.pool.row == row), kept.sample(4, g)
    cond = asked.cond[[row]] if plain_steps else method.attack(ctx, student, asked.slots[row], at, asked.cond[[row]], g)
    with torch.no_grad():
        empty, full = (
            ctx.backbone.predict(at.x, at.tau, c.repeat(3), guidance=ctx.protocol.guidance)
            for c in (ctx.backbone.encode([""]), asked.cond[[row]])
        )
        goal = empty - 0.5 * (full - empty)
        wanted = (student.predict(at.x, at.tau, cond.repeat(3)) - goal).double().square().mean()
        retain = (student.predict(keep.x, keep.tau, keep.cond) - keep.predictions[:, 1]).double().square().mean()
    assert found["erase"].item() == pytest.approx(float(wanted), rel=1e-3)
    assert found["retain"].item() == pytest.approx(0.25 * float(retain), rel=1e-4)
    assert plain_steps or not torch.allclose(cond.tokens.cpu(), asked.cond[[row]].tokens)


def test_prefixes_are_read_by_every_text_encoder(made):
    _, ctx, _, asked = made()
    row = 0
    vectors = {n: torch.zeros(1, own.lexicon.vectors.shape[1]) for n, own in asked.slots[row].items()}
    assert set(vectors) == set(ctx.backbone.encoders)
    changed = read_soft(ctx.backbone, [asked.slots[row]], [vectors], asked.cond[[row]])
    assert not torch.allclose(changed.tokens.cpu(), asked.cond[[row]].tokens)


def test_a_step_of_the_attack_follows_the_sign_of_the_gradient(made):
    method, ctx, student, asked = made(attack_steps=1, attack_lr=0.05)
    row, like = int(asked.pool.row[0]), asked.cond[[int(asked.pool.row[0])]]
    at = asked.pool.sample(3, torch.Generator().manual_seed(1), asked.pool.row == row)
    found = method.attack(ctx, student, asked.slots[row], at, like, torch.Generator().manual_seed(2))
    generator, vectors = torch.Generator().manual_seed(2), {}
    for name, own in asked.slots[row].items():
        start = own.lexicon.vectors[random_tokens(own.lexicon, len(own.at), generator)]
        vectors[name] = start.float().clone().requires_grad_()
    prediction = student.predict(at.x, at.tau, read_soft(ctx.backbone, [asked.slots[row]], [vectors], like).repeat(3))
    error = (prediction - at.predictions[:, 0]).square().sum()
    slopes = torch.autograd.grad(error, list(vectors.values()))
    moved = {name: v.detach() - 0.05 * slope.sign() for (name, v), slope in zip(vectors.items(), slopes, strict=True)}
    with torch.no_grad():
        wanted = read_soft(ctx.backbone, [asked.slots[row]], [moved], like)
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=1e-4, atol=1e-5)
