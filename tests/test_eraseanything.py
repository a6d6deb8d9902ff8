"""EraseAnything: its terms by hand, its words, who is trained by which level, whole erasures on the tiny models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from erasekit.backbones.attention import token_positions
from erasekit.erasures.deltas import to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.methods.context import RunContext
from erasekit.methods.images import kept_images
from erasekit_eraseanything import losses
from erasekit_eraseanything.material import material, synonyms_of, unrelated_to
from erasekit_eraseanything.method import EraseAnything, EraseAnythingConfig
from erasekit_eraseanything.words import SYNONYMS, UNRELATED, reword
from tests.third_party.tiny_world import Words

SMALL = {"steps": 4, "batch": 3, "rank": 2, "images": 2, "kept_images": 5, "versions": 3, "warmup": 0, "negatives": 2}
MATERIAL = EraseAnythingConfig(images=2, versions=3, shuffle=1.0, swap=1.0, unrelated=("a ship", "red"))


def context(backbone, names=("cat", "dog"), seed=0, **changes):
    task = Words()
    return RunContext(backbone, tuple(task.concept(n).model_copy(update=changes) for n in names), task, seed)


def method(backbone, **settings):
    """EraseAnything as the family's mini model has it, and what a test asks for."""
    mini = {"unet": "sd15-mini", "dit": "flux-mini"}[backbone.capabilities.family]
    defaults = EraseAnything.defaults.get(backbone.capabilities.family, {}) | EraseAnything.defaults[mini]
    return EraseAnything(EraseAnythingConfig(**defaults | SMALL | settings))


def maps(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1) for shape in shapes]


TOKENS = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)


# The terms


def test_the_regulariser_is_the_norm_over_heads_of_the_concepts_columns():
    layers, total = maps((2, 3, 4, 5), (2, 2, 16, 5)), 0.0
    for layer in layers:
        b, h, image, text = layer.shape
        total += sum(
            math.sqrt(sum(float(layer[i, k, j, t]) ** 2 for k in range(h))) / (b * image)
            for i in range(b)
            for j in range(image)
            for t in range(text)
            if TOKENS[i, t]
        )
    assert losses.columns(layers, TOKENS).item() == pytest.approx(total / 2, rel=1e-10)
    assert losses.columns(layers, TOKENS & False).item() == 0


def test_the_product_of_features_is_the_correlation_of_the_heat():
    one, two = maps((2, 3, 4, 5)), maps((2, 3, 4, 5), seed=1)
    got = (losses.feature(one, TOKENS) * losses.feature(two, TOKENS)).sum(1)
    for i in range(2):
        heats = []
        for layer in (one[0], two[0]):
            heat = layer[i][..., TOKENS[i]].mean(-1).numpy()
            heats.append((heat - heat.mean(1, keepdims=True)).ravel())
        want = np.dot(*heats) / (np.linalg.norm(heats[0]) * np.linalg.norm(heats[1]))
        assert got[i].item() == pytest.approx(want, rel=1e-10)


def test_features_have_length_one_whatever_the_strength():
    layers = maps((2, 3, 4, 5), (2, 2, 16, 5))
    feature = losses.feature(layers, TOKENS)
    torch.testing.assert_close(feature.norm(dim=1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(losses.feature([0.1 * m for m in layers], TOKENS), feature)
    assert losses.feature(layers, TOKENS & False).eq(0).all()  # a word that was cut off


def test_contrast_by_hand():
    generator = torch.Generator().manual_seed(0)
    anchor, near, far = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (4, 2, 3), (1, 2, 3))
    )
    want = 0.0
    for i in range(2):
        a = [math.exp(float(anchor[i] @ near[k, i]) / 0.7) for k in range(4)]
        b = [math.exp(float(anchor[i] @ far[0, i]) / 0.7)]
        want -= math.log(sum(a) / (sum(a) + sum(b))) / 2
    assert losses.contrast(anchor, near, far, 0.7).item() == pytest.approx(want, rel=1e-10)


def test_contrast_draws_the_anchor_to_other_words_and_off_its_own():
    own, other = torch.eye(3, dtype=torch.float64)[:2]
    anchor = own.clone()[None].requires_grad_()
    near, far = other.clone()[None, None].requires_grad_(), own.clone()[None, None].requires_grad_()
    losses.contrast(anchor, near, far, 0.07).backward()
    assert -anchor.grad[0] @ other > 0
    assert -anchor.grad[0] @ own < 0
    assert near.grad is None
    assert far.grad is None


# Words


def test_rewordings_keep_every_word_and_say_where_the_phrase_is():
    prompt, seen = "a photo of a cat by the ship", set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        text, phrase, frame = reword(prompt, "a cat", ["a kitten", "a kitty"], generator, shuffle=1.0, swap=1.0)
        assert sorted(text.replace(phrase, "a cat").split()) == sorted(prompt.split())
        assert phrase in ("a kitten", "a kitty")
        assert frame.replace("{}", phrase) == text
        seen.add(text)
    assert len(seen) > 10
    generator = torch.Generator().manual_seed(0)
    assert reword(prompt, "a cat", ["x"], generator, shuffle=0, swap=0) == (prompt, "a cat", "a photo of {} by the ship")


def test_lists_come_from_the_settings_then_the_concept_then_ours():
    task = Words()
    cat = task.concept("cat:kitty")
    assert synonyms_of(cat, {}) == ["kitty", *SYNONYMS["cat"]]
    assert synonyms_of(cat, {"cat": ("puss",)}) == ["kitty", "puss"]
    assert synonyms_of(cat.model_copy(update={"name": "sofa", "phrases": ("sofa",)}), {}) == []
    preserving = cat.model_copy(update={"preserve": ("dog", "ship")})
    dog = task.concept("dog")
    assert unrelated_to([cat], cat, ()) == list(UNRELATED)
    assert unrelated_to([preserving], preserving, ()) == ["dog", "ship"]
    assert unrelated_to([preserving, dog], preserving, ()) == ["ship"]
    assert unrelated_to([preserving], preserving, ("red",)) == ["red"]
    only_erased = cat.model_copy(update={"preserve": ("dog",)})
    assert unrelated_to([only_erased, dog], only_erased, ()) == list(UNRELATED)


# Material


def test_material_pairs_images_with_their_wordings(backbone):
    ctx = context(backbone, ("cat",), templates=("a photo of {}",), phrases=("a cat",))
    own = material(ctx, ctx.concepts[0], MATERIAL)
    assert own.x0.shape == backbone.latents([0, 1], 16).shape
    assert len(own.wordings.cond) == len(own.neutral) == 2 * own.versions
    plain = backbone.encode(["a photo of a cat"])
    assert torch.equal(own.wordings.cond.tokens[[0]], plain.tokens)
    assert torch.equal(own.wordings.tokens[[0]], token_positions(backbone, ["a photo of a cat"], ["a cat"]))
    assert torch.equal(own.neutral.tokens[[0]], backbone.encode(["a photo of thing"]).tokens)
    assert own.wordings.tokens.any(1).all()
    assert len(own.synonyms) == len(SYNONYMS["cat"])
    assert len(own.others) == 3  # the neutral word and two unrelated ones
    assert torch.equal(own.others[0].cond.tokens, backbone.encode(["a photo of thing"]).tokens)


def test_without_a_neutral_word_the_target_is_the_empty_prompts(backbone):
    ctx = context(backbone, ("cat",), neutral="")
    own = material(ctx, ctx.concepts[0], MATERIAL)
    assert torch.equal(own.neutral.tokens, backbone.encode([""] * 6).tokens)
    assert len(own.others) == 2


def test_a_concept_that_no_prompt_speaks_of_is_refused(backbone):
    ctx = context(backbone, ("cat",), templates=("red",), phrases=("zebra",))
    with pytest.raises(UsageError, match="holds its phrases"):
        material(ctx, ctx.concepts[0], MATERIAL)


def test_every_fifth_kept_image_is_of_the_empty_prompt(backbone):
    x0, cond = kept_images(context(backbone), 10, "kept")
    assert len(x0) == len(cond) == 10
    empty = backbone.encode([""]).tokens[0]
    assert [torch.equal(t, empty) for t in cond.tokens] == [i % 5 == 4 for i in range(10)]


# Steps


def test_loras_of_a_real_model_sit_where_the_class_says(backbone):
    published = EraseAnything.defaults.get(backbone.capabilities.family, {})
    names = backbone.lora_targets(EraseAnythingConfig(**published).scope)
    if backbone.capabilities.family == "unet":
        assert {name.split(".")[-2] for name in names} == {"attn2"}
        assert {name.rpartition(".")[2] for name in names} == {"to_k", "to_v"}
        assert {name.rpartition(".")[2] for name in backbone.lora_targets("qk")} == {"to_k", "to_q"}
    else:
        assert {name.rpartition(".")[2] for name in names} == {"add_k_proj", "add_q_proj"}


def test_every_term_trains_the_lora_in_turn_and_no_other(backbone):
    ctx = context(backbone)
    with method(backbone, erase=1.0, attention=1.0, preserve=1.0, contrast=1.0).student(ctx) as (bank, step, parameters):
        generator = ctx.generator("noise")
        with torch.no_grad():  # away from the start, where the student is the teacher
            for p in parameters:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        reached = {}
        for batch in range(4):
            turn, names = batch // 2, ("preserve", "contrast") if batch % 2 else ("erase", "attention")
            assert tuple(step(batch, ctx.generator("x"))) == names
            for name in names:
                value = step(batch, ctx.generator("x"))[name]
                own = bank.train_only(bank.names[turn])
                assert not any(p.requires_grad for p in parameters if all(p is not q for q in own))
                grads = torch.autograd.grad(value, own, allow_unused=True)
                reached[turn, name] = [g is not None and bool(g.abs().sum() > 0) for g in grads]
        assert not any(p.requires_grad for n, p in backbone.denoiser.named_parameters() if "lora_" not in n)
        assert all(any(of) for of in reached.values())
        assert all(all(reached[turn, name]) for turn in (0, 1) for name in ("erase", "preserve"))


def test_a_fresh_student_is_the_teacher(backbone):
    ctx = context(backbone, ("cat",))
    with method(backbone, erase=2.0).student(ctx) as (_, step, _):
        assert step(1, ctx.generator("x"))["preserve"].item() < 1e-10
        parts = step(0, ctx.generator("x"))
        own, generator = step.materials[0], ctx.generator("x")
        image = torch.randint(len(own.x0), (3,), generator=generator)
        row = image * own.versions + torch.randint(own.versions, image.shape, generator=generator)
        tau = torch.rand(3, generator=generator)
        noise = torch.randn(own.x0[image].shape, generator=generator)
        x = backbone.add_noise(own.x0[image], noise, tau)
        with torch.no_grad():
            concept, neutral = (ctx.predict(x, tau, cond[row]) for cond in (own.wordings.cond, own.neutral))
        gap = (concept - (2 * neutral - concept)).double().square().mean()  # eta 1
        assert parts["erase"].item() == pytest.approx(2 * gap.item(), rel=1e-3)


def test_the_teacher_stays_the_base_while_the_student_moves(backbone):
    ctx = context(backbone, ("cat",))
    with method(backbone).student(ctx) as (_, step, parameters):
        before = step(1, ctx.generator("x"))["preserve"].item()
        with torch.no_grad():
            for p in parameters:
                p.add_(0.3)
        assert step(1, ctx.generator("x"))["preserve"].item() > 100 * max(before, 1e-12)


def test_the_contrastive_term_falls_under_its_own_gradient(backbone):
    ctx = context(backbone, ("cat",))
    with method(backbone, contrast=1.0, batch=4).student(ctx) as (bank, step, _):
        parameters = bank.train_only("cat")
        values, optimizer = [], torch.optim.Adam(parameters, 0.02)
        for _ in range(12):
            optimizer.zero_grad()
            value = step.contrast(step.materials[0], ctx.generator("x"))
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[-1] < values[0]


def test_the_last_layer_alone_can_be_looked_at(backbone):
    ctx = context(backbone, ("cat",))
    sizes = {}
    for layers in ("all", "last"):
        with method(backbone, layers=layers).student(ctx) as (_, step, _):
            _, seen = step._attend(step.kept_x0[:1], torch.tensor([0.5]), step.kept_cond[:1])
            sizes[layers] = len(seen)
    assert sizes["last"] == 1 < sizes["all"]


# Whole erasures


def test_an_erasure_of_two_concepts(backbone, tmp_path):
    before = {key: value.clone() for key, value in backbone.denoiser.state_dict().items()}
    erasure = method(backbone).erase(context(backbone))
    after = backbone.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad for p in backbone.denoiser.parameters())
    assert {name: sorted(own) for name, own in erasure.deltas.items()} == {"cat": ["adapter"], "dog": ["adapter"]}
    for own in erasure.deltas.values():
        assert sorted(own["adapter"]) == sorted(backbone.lora_targets(method(backbone).config.scope))
        assert sum(float(to_dense(d).abs().max()) > 0 for d in own["adapter"].values()) > 1
    erasure.save(tmp_path / "erasure")
    loaded = Erasure.load(tmp_path / "erasure", backbone)
    assert EraseAnythingConfig(**loaded.config) == EraseAnythingConfig(**erasure.config)


def test_a_seed_decides_every_byte(backbone, tmp_path):
    hashes = [method(backbone).erase(context(backbone, seed=s)).save(tmp_path / str(i)) for i, s in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


@pytest.mark.parametrize("chosen", [*EraseAnything.ablations.items(), *EraseAnything.presets.items()], ids=lambda pair: pair[0])
def test_ablations_and_presets_are_valid_and_differ_from_a_minis_default(chosen):
    mini = EraseAnything.defaults["flux-mini"]
    assert EraseAnythingConfig(**mini | chosen[1]) != EraseAnythingConfig(**mini)
