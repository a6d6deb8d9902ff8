"""MACE: its loss by hand, its stages on the tiny models; its solves are in test_fusion.py."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from erasekit.backbones.attention import attention_maps, token_positions
from erasekit.erasures.deltas import merged, summed, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import phrased_prompts
from erasekit.methods.sites import held, kept_moment
from erasekit_mace import losses, masks
from erasekit_mace.inputs import beside, hidden_moments
from erasekit_mace.method import Mace, MaceConfig, _kept
from erasekit_mace.plugin import register_components
from tests.third_party.tiny_world import Words

SMALL = {"steps": 3, "batch": 2, "images": 3, "kept_images": 3, "warmup": 0}


def context(backbone, names=("cat", "dog"), seed=0, **changes):
    task = Words()
    concepts = tuple(task.concept(name).model_copy(update=changes) for name in names)
    return RunContext(backbone, concepts, task, seed, component=lambda slot, name: getattr(masks, name))


def method(backbone, **settings):
    """MACE as the family's mini model has it, and what a test asks for."""
    mini = {"unet": "sd15-mini", "dit": "flux-mini"}[backbone.capabilities.family]
    return Mace(MaceConfig(**Mace.defaults.get(backbone.capabilities.family, {}) | Mace.defaults[mini] | SMALL | settings))


# The loss


def test_suppression_by_hand():
    maps = [torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 1, 16, 5, dtype=torch.float64)]
    tokens = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    mask = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    total = 0.0
    for layer, side in zip(maps, (2, 4), strict=True):
        b, h, image, text = layer.shape
        block = 4 // side
        value = 0.0
        for i in range(b):
            for j in range(image):
                r, c = divmod(j, side)
                m = float(mask[i, 0, r * block : (r + 1) * block, c * block : (c + 1) * block].mean())
                value += sum(float(layer[i, k, j, t]) ** 2 * m**2 for k in range(h) for t in range(text) if tokens[i, t])
        total += value / (b * h * image)
    assert losses.suppression(maps, tokens, mask).item() == pytest.approx(total / 2, rel=1e-10)
    assert losses.suppression(maps, tokens, 0 * mask).item() == 0
    assert losses.suppression(maps, ~tokens & False, mask).item() == 0


def test_the_window_is_the_papers_timesteps():
    tau = losses.sample_tau((0.6, 0.8), 20_000, torch.Generator().manual_seed(0))
    timestep = 1000 * (1 - tau)
    density = torch.sigmoid(0.05 * (torch.arange(1000) - 200.0)) - torch.sigmoid(0.05 * (torch.arange(1000) - 400.0))
    want = density / density.sum()
    seen = torch.histc(timestep.float(), 10, 0, 1000) / len(tau)
    torch.testing.assert_close(seen, want.view(10, 100).sum(1), atol=0.02, rtol=0)
    assert seen[2:4].sum() > 0.8
    everywhere = losses.sample_tau((0.0, 1.0), 20_000, torch.Generator().manual_seed(0))
    assert (torch.histc(everywhere.float(), 5, 0, 1) / len(everywhere)).min() > 0.15


# What the closed forms are computed from


def test_words_beside_the_concept_are_paired_with_the_same_words_of_the_neutral_prompt(sd):
    ctx = context(sd, ("cat",))
    ((mine, goal),) = beside(ctx, ctx.concepts[0], ["a cat by the ship"], "tokens")
    concept, neutral = (sd.encode([f"a {w} by the ship"]).tokens[0].double() for w in ("cat", "thing"))
    assert torch.equal(mine, concept[3:])  # begin, "a" and the concept itself are left out
    assert torch.equal(goal, neutral[3:])


def test_every_word_beside_the_concept_counts_in_t5(flux):
    ctx = context(flux, ("cat",))
    ((mine, goal),) = beside(ctx, ctx.concepts[0], ["a cat by the ship"], "tokens")
    concept, neutral = (flux.encode([f"a {w} by the ship"]).tokens[0].double() for w in ("cat", "thing"))
    outside = [0, *range(2, len(concept))]
    assert torch.equal(mine, concept[outside])
    assert torch.equal(goal, neutral[outside])
    (pooled,) = beside(ctx, ctx.concepts[0], ["a cat"], "pooled")
    assert torch.equal(pooled[0], flux.encode(["a cat"]).pooled.double())
    assert torch.equal(pooled[1], flux.encode(["a thing"]).pooled.double())


def test_without_a_neutral_word_nothing_before_the_phrase_is_moved_in_clip(sd):
    ctx = context(sd, ("cat",), neutral="")
    ((mine, goal),) = beside(ctx, ctx.concepts[0], ["a photo of a cat"], "tokens")
    assert torch.equal(mine, sd.encode(["a photo of a cat"]).tokens[0, 6:].double())
    assert len(goal) == len(mine)


def test_prompts_without_the_phrase_are_left_out(sd):
    ctx = context(sd, ("cat",), templates=("{}", "a photo of {}"))
    assert phrased_prompts(ctx, ctx.concepts[0]) == ["cat", "a photo of cat", "a photo of a cat"]
    with pytest.raises(UsageError, match="holds its phrases"):
        phrased_prompts(ctx, ctx.concepts[0].model_copy(update={"templates": ("red",), "phrases": ("ship",)}))


def test_hidden_moments_are_of_all_tokens(flux):
    ctx, site = context(flux), "context_embedder"  # reads the text itself, at every point of the way
    cond, x0 = flux.encode(["a cat", "a photo of a dog"]), flux.latents([0, 1])
    read = hidden_moments(ctx, [site], x0, cond, "rows")[site]
    tokens = cond.tokens.flatten(0, 1).double()
    torch.testing.assert_close(read, 4 * tokens.T @ tokens)


# Masks


def test_every_choice_of_the_slot_is_there():
    register_components(lambda slot, name, target, **_: getattr(import_module(target.split(":")[0]), target.split(":")[1]))


def test_masks_are_where_the_base_attends(backbone):
    ctx, prompts = context(backbone, ("cat",)), ["a photo of a cat", "cat by the ship"]
    cond, positions = backbone.encode(prompts), token_positions(backbone, prompts, ["cat"])
    x0 = backbone.latents([0, 1], 16)
    found = masks.attention(ctx, ctx.concepts[0], x0, cond, positions, None)
    assert found.shape[:2] == (2, 1)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert ((found.mean((1, 2, 3)) > 0) & (found.mean((1, 2, 3)) < 1)).all()
    style = ctx.concepts[0].model_copy(update={"kind": "style"})
    assert masks.attention(ctx, style, x0, cond, positions, None).min() == 1
    assert torch.equal(masks.whole(ctx, ctx.concepts[0], x0, cond, positions, None), torch.ones(2, 1, 1, 1))


def test_a_mask_counts_only_the_last_token_of_a_phrase(sd, monkeypatch):
    ctx, prompts = context(sd, ("cat",)), ["a photo of a cat"]
    cond, x0 = sd.encode(prompts), sd.latents([0])
    asked = []
    monkeypatch.setattr(masks, "_image", lambda m, t, own=masks._image: asked.append(t) or own(m, t))
    masks.attention(ctx, ctx.concepts[0], x0, cond, token_positions(sd, prompts, ["a cat"]), None)
    assert all(t.nonzero().tolist() == [[0, 5]] for t in asked)


# The stages


def test_suppressed_tokens_are_the_phrase_and_in_clip_the_end(backbone):
    ctx = context(backbone, ("cat",), phrases=("a cat",), templates=("a photo of {}",))
    drawn = method(backbone, images=1).images(ctx, ctx.concepts[0])
    positions = drawn.tokens[0].nonzero().flatten().tolist()
    if backbone.capabilities.family == "unet":
        assert positions == [4, 5, *range(6, drawn.cond.tokens.shape[1])]
    else:
        assert positions == [3, 4]


def test_the_loss_reaches_the_lora_alone_and_falls(backbone):
    ctx, mace = context(backbone, ("cat",)), method(backbone, window=(0.2, 0.8), masks="whole")
    drawn = mace.images(ctx, ctx.concepts[0])
    bank = AdapterBank(backbone)
    bank.add("cat", backbone.lora_targets(mace.config.scope), 1, ctx.generator("init"))
    parameters, loss = bank.train_only("cat"), mace.losses(ctx, drawn)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    value = loss(0, ctx.generator("x"))["attention"]
    value.backward()
    reached = {n.replace(".bank_0", "") for n, p in backbone.denoiser.named_parameters() if p.grad is not None}
    keys = [t for t in backbone.lora_targets(mace.config.scope) if t.endswith(("to_k", "add_k_proj"))]
    assert {f"{t}.lora_{side}.weight" for t in keys for side in "AB"} <= reached
    assert all(p.grad is None for n, p in backbone.denoiser.named_parameters() if "lora_" not in n)
    optimizer = torch.optim.Adam(parameters, 0.05)
    for _ in range(15):
        optimizer.zero_grad()
        loss(0, ctx.generator("x"))["attention"].backward()
        optimizer.step()
    assert loss(0, ctx.generator("x"))["attention"].item() < 0.9 * value.item()
    bank.remove()


def test_the_refinement_moves_co_occurring_words_to_the_neutral_ones_and_keeps_the_rest(backbone):
    ctx = context(backbone, ("cat",), phrases=("cat",), templates=("a {}", "a photo of {}"))
    mace = method(backbone, ridge=1e-9, refine_preserve=1e-3)
    deltas = mace.refine(ctx)["cat"]
    site = backbone.text_sites()[0]
    weight, delta = backbone.weight(site.name).double(), to_dense(deltas[site.name])
    found = beside(ctx, ctx.concepts[0], phrased_prompts(ctx, ctx.concepts[0]), "tokens")
    mine, goal = (torch.cat(side) for side in zip(*found, strict=True))
    before, after = (((w @ mine.T) - weight @ goal.T).norm() for w in (weight, weight + delta))
    assert after < 0.3 * before
    held = method(backbone, ridge=1e-9, refine_preserve=1e3).refine(ctx)["cat"]
    still = backbone.encode(["a photo of a ship"]).tokens[0].double()
    drift, free = ((to_dense(d[site.name]) @ still.T).norm() for d in (held, deltas))
    assert drift < 0.2 * free


def test_an_erasure_of_two_concepts(backbone, tmp_path):
    before = {key: value.clone() for key, value in backbone.denoiser.state_dict().items()}
    ctx, mace = context(backbone), method(backbone)
    erasure = mace.erase(ctx)
    after = backbone.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad for p in backbone.denoiser.parameters())
    raw = backbone.capabilities.family == "unet"
    parts = {name: sorted(own) for name, own in erasure.deltas.items()}
    assert parts == dict.fromkeys(("cat", "dog"), ["fusion"] if raw else ["fusion", "refine"])
    for own in erasure.deltas.values():
        assert list(own["fusion"]) == backbone.lora_targets(mace.config.scope)
        assert raw or sorted(own["refine"]) == sorted(site.name for site in backbone.text_sites())
    erasure.save(tmp_path / "erasure")
    loaded = Erasure.load(tmp_path / "erasure", backbone)
    assert MaceConfig(**loaded.config) == MaceConfig(**erasure.config)
    assert summed([loaded.total()]).keys() == erasure.total().keys()


def test_a_seed_decides_every_byte(backbone, tmp_path):
    hashes = [method(backbone).erase(context(backbone, seed=s)).save(tmp_path / str(i)) for i, s in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_the_fused_edit_is_what_the_loras_do_on_the_concepts_prompts(sd):
    """With nothing else to keep and no ridge, fusion reproduces the refinement and the LoRA of one concept on its prompts."""
    ctx = context(sd, ("cat",))
    mace = method(sd, fuse_preserve=0.0, ridge=0.0, refine_preserve=1.0)
    refined = mace.refine(ctx)["cat"]
    with merged(sd.denoiser, refined):
        lora = mace.suppress(ctx, ctx.concepts[0], mace.images(ctx, ctx.concepts[0]))
    (fused,) = mace.fuse(ctx, refined, [lora], mace.moments(ctx, [], None))
    tokens = sd.encode(phrased_prompts(ctx, ctx.concepts[0])).tokens.flatten(0, 1).double()
    assert any(to_dense(d).abs().max() > 0 for d in lora.values())
    for layer, delta in fused.items():
        want = tokens @ (to_dense(refined[layer]) + to_dense(lora[layer]).double()).T
        assert (tokens @ to_dense(delta).T - want).norm() < 1e-4 * want.norm()


def test_suppression_lowers_the_attention_to_the_concept(sd):
    ctx = context(sd, ("cat",), phrases=("cat",))
    attention = {}
    for steps in (0, 30):
        mace = method(sd, steps=steps, lr=0.1, ridge=1e-4, fuse_preserve=0.0, masks="whole", batch=4)
        drawn = method(sd, masks="whole").images(ctx, ctx.concepts[0])
        total = mace.erase(ctx).total()
        with merged(sd.denoiser, total), attention_maps(sd.denoiser) as maps, torch.no_grad():
            tau = torch.full((len(drawn.x0),), 0.5)
            sd.predict(drawn.x0, tau, drawn.cond)
        attention[steps] = losses.suppression(maps.values(), drawn.tokens, drawn.masks).item()
    assert attention[30] < attention[0]


def test_without_steps_there_is_the_refinement_alone(backbone):
    erasure = method(backbone, steps=0).erase(context(backbone))
    part = "fusion" if backbone.capabilities.family == "unet" else "refine"
    assert {name: list(own) for name, own in erasure.deltas.items()} == {"cat": [part], "dog": [part]}


@pytest.mark.parametrize("chosen", [*Mace.ablations.items(), *Mace.presets.items()], ids=lambda pair: pair[0])
def test_ablations_and_presets_are_valid_and_differ_from_a_minis_default(chosen):
    mini = Mace.defaults["sd15-mini"]
    assert MaceConfig(**mini | chosen[1]) != MaceConfig(**mini)


def test_what_the_concepts_ask_to_keep_is_kept_and_every_pad_of_the_empty_prompt(sd):
    ctx = context(sd, templates=("a {}",), preserve=("ship", "cat"))  # a cat is erased, whoever asks for it
    preserved, captions = ["", "a ship", "a photo of a ship"], [f"a photo of a {w}" for w in ("red", "kitten", "photo")]
    assert _kept(ctx) == (preserved, captions)
    asked = sd.encode([*preserved, ""]).tokens.flatten(0, 1).double()  # the empty prompt as often as the two others
    said = sd.encode(captions).tokens.flatten(0, 1).double()
    torch.testing.assert_close(kept_moment(sd, preserved, "tokens").total_DD, asked.T @ asked)
    torch.testing.assert_close(held(sd, captions, "tokens").total_DD, said.T @ said)
    torch.testing.assert_close(method(sd).kept(ctx, "tokens"), asked.T @ asked + said.T @ said)
    weighed = method(sd, domain=9.0, captions=12).kept(ctx, "tokens")
    torch.testing.assert_close(weighed, 9 * asked.T @ asked + 4 * said.T @ said)
