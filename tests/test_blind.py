"""The stage that trains the denoiser not to draw a concept: its target against the backbone's own x0, and what it moves."""

import torch

from erasekit.attacks.tokens import words
from erasekit.concepts import Concept
from erasekit.erasures.deltas import merged
from erasekit.methods.images import kept_images, noised
from erasekit.registration.plugins import default
from erasekit.safety import is_unsafe
from erasekit.settings import Settings
from erasekit_stereo import blind


def test_the_target_is_the_prediction_that_ends_in_the_goal(backbone):
    x, goal, tau = backbone.latents([0, 1], 16), backbone.latents([2, 3], 16), torch.tensor([0.25, 0.5])
    target, rate = blind.towards(backbone, x, goal, tau)
    assert torch.allclose(backbone.to_x0(target, x, tau), goal, atol=1e-4)
    assert rate.shape == x.shape


def stage(ctx, **settings):
    """The deltas of a short stage, and what it looked at."""
    small = {"words": 1, "word_steps": 2, "scrambled": 4, "images": 3, "batch": 6, "steps": 25, "lr": 1e-2, "rank": 4}
    config = blind.BlindConfig(**small | settings)
    deltas = blind.Blind(config)(ctx, {"cat": {}}, Settings())
    assert set(deltas) == {"cat"}
    text = {site.name for site in ctx.backbone.text_sites()}
    assert set(deltas["cat"]) - text, "more is trained than what reads text"
    return deltas["cat"], blind._seen(ctx, ctx.concepts[0], config)


def test_images_of_the_concept_are_finished_as_something_else_and_the_rest_is_held(ctx):
    deltas, seen = stage(ctx)
    tau = torch.full((3,), 0.5)
    x = noised(ctx, seen.shown, tau, torch.Generator().manual_seed(0))
    target, rate = blind.towards(ctx.backbone, x, seen.goals, tau)

    @torch.no_grad()
    def errors():
        found = [((ctx.predict(x, tau, side) - target) * rate).square().mean() for side in (seen.asked, seen.neutral)]
        return torch.stack(found)

    before = errors()
    with merged(ctx.backbone.denoiser, deltas):
        after = errors()
    assert (after < before).all()


def test_an_image_that_shows_little_yet_turns_away_from_the_concept_under_its_words_among_others(ctx):
    repel = 10.0
    deltas, seen = stage(ctx, until=0.1, repel=repel, lr=5e-3, steps=50)  # nothing later is trained on
    n, tau = torch.arange(24), torch.zeros(24)
    x = noised(ctx, seen.shown[n % 3], tau, torch.Generator().manual_seed(0))
    with torch.no_grad():
        neutral = ctx.predict(x, tau, seen.plain[n % len(seen.plain)])
        aim = neutral + repel * (neutral - ctx.predict(x, tau, seen.asked[n % 3]))
        before = (ctx.predict(x, tau, seen.scrambled[n % 4]) - aim).square().mean()
        with merged(ctx.backbone.denoiser, deltas):
            after = (ctx.predict(x, tau, seen.scrambled[n % 4]) - aim).square().mean()
    assert after < 0.95 * before


def test_prompts_of_the_concept_are_held_at_the_neutral_ones_where_nothing_shows_it(ctx):
    deltas, seen = stage(ctx, gone=0.5, preserve_scale=1e3, lr=3e-3, steps=40)  # little but what is held counts
    n, tau = torch.arange(24), torch.full((24,), 0.5)
    x = noised(ctx, seen.goals[n % 3], tau, torch.Generator().manual_seed(0))
    with torch.no_grad():
        neutral = ctx.predict(x, tau, seen.neutral[n % 3])
        before = (ctx.predict(x, tau, seen.asked[n % 3]) - neutral).square().mean()
        with merged(ctx.backbone.denoiser, deltas):
            after = (ctx.predict(x, tau, seen.asked[n % 3]) - neutral).square().mean()
    assert after < 0.8 * before


def test_scrambled_prompts_hold_a_word_of_the_concept_among_tokens_of_any_kind(ctx):
    backbone, concept = ctx.backbone, ctx.concepts[0].model_copy(update={"phrases": ("a cat", "the kitten")})
    found = blind.scrambled(backbone, concept, 12, torch.Generator().manual_seed(0))
    again = blind.scrambled(backbone, concept, 12, torch.Generator().manual_seed(0))
    assert torch.equal(found.tokens, again.tokens)
    assert len({tuple(row) for row in found.ids.tolist()}) > 8
    reads = next(name for name, field in backbone.reads.items() if field == "tokens")
    said = ["".join(f",{i}" for i in words(backbone, reads, word).tolist()) + "," for word in ("cat", "kitten")]
    rows = ["".join(f",{i}" for i in row) + "," for row in found.ids.tolist()]
    assert all(any(word in row for word in said) for row in rows)
    assert all(any(word in row for row in rows) for word in said)
    assert blind.scrambled(backbone, concept, 0, torch.Generator()) is None


def test_scrambled_prompts_are_none_that_a_user_would_be_refused():
    """Random tokens may put what is forbidden beside the concept's own words."""
    kind = default().backbones.get("sd15-mini")
    backbone, concept = kind.load(kind.Config(device="cpu")), Concept(name="nudity", phrases=("nsfw", "child"))
    found = blind.scrambled(backbone, concept, 40, torch.Generator().manual_seed(0))
    texts = [backbone.spell("text_encoder", ids) for ids in found.ids]
    assert is_unsafe("nsfw child")
    assert 0 < len(texts) < 40
    assert not any(map(is_unsafe, texts))


def test_nothing_that_is_drawn_unasked_is_held(ctx):
    """A model draws a concept that it has often seen without being asked: holding such images would keep it."""
    empty = ctx.backbone.encode([""]).tokens[0]
    held = {flag: kept_images(ctx, 10, "held", unasked=flag)[1].tokens for flag in (True, False)}
    assert [k for k in range(10) if torch.equal(held[True][k], empty)] == [4, 9]
    assert not any(torch.equal(row, empty) for row in held[False])
    seen = blind._seen(ctx, ctx.concepts[0], blind.BlindConfig(images=2, scrambled=1))
    assert not any(torch.equal(row, empty) for row in seen.prompts.tokens)
