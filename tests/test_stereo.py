"""STEREO and its words as a stage: the last target against a plain formula, words against the model they are learned on."""

import pytest
import torch

from erasekit.attacks.losses import denoise_loss
from erasekit.attacks.words import points
from erasekit.backbones.alignment import align
from erasekit.erasures.deltas import Dense, merged, summed, to_dense
from erasekit.methods.context import RunContext
from erasekit.methods.images import images_of
from erasekit.methods.sites import site_weights
from erasekit.registration.plugins import default
from erasekit.settings import Settings
from erasekit_stereo import harden
from erasekit_stereo.method import Stereo, StereoConfig, composed
from erasekit_stereo.words import learned, read
from tests.third_party.tiny_world import Words

SMALL = {"steps": 2, "batch": 2, "trajectories": 3, "images": 3, "word_steps": 3, "loops": 1, "guidance": None}


def scope(backbone):
    return "kv" if backbone.capabilities.family == "unet" else "text"


def test_the_last_target_is_the_papers_formula():
    g = torch.Generator().manual_seed(0)
    anchor, none, scene = (torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(3))
    words = torch.randn(4, 2, 3, generator=g, dtype=torch.float64)
    found = composed(anchor, none, scene, words, keep=1.0, push=3.0)
    for b in range(2):
        for i in range(3):
            away = sum(float(words[k, b, i] - none[b, i]) for k in range(4)) / 4
            wanted = float(anchor[b, i]) + float(scene[b, i] - none[b, i]) - 3 * away
            assert float(found[b, i]) == pytest.approx(wanted, rel=1e-12)


def test_a_word_explains_images_of_the_concept_better_than_it_began(ctx):
    backbone, concept = ctx.backbone, ctx.concepts[0]
    x0, _ = images_of(ctx, concept.prompts(), 4, torch.Generator().manual_seed(0))
    at = points(backbone, ctx.protocol, x0[[0]], 24, torch.Generator().manual_seed(1))

    x = x0[torch.arange(24) % 4]

    def error(steps):
        word = learned(ctx, concept, x0, name="word", steps=steps, batch=4, lr=0.05)
        with torch.no_grad():
            cond = read(ctx, word, ["{}"]).repeat(24)
            return float(denoise_loss(backbone, x, cond, at.tau, at.noise, predict=ctx.predict))

    began, after = error(1), error(40)
    assert after < began


def test_words_are_learned_on_the_erased_model_and_erased_from_the_base(ctx):
    """What brings the concept back depends on the model that it is learned on; the last erasing begins at the base."""
    method = Stereo(StereoConfig(**SMALL, scope=scope(ctx.backbone), anchor="neutral"))
    own, other = (method.begin(ctx, ctx.concepts[0]) for _ in range(2))
    method.hunt(ctx, own, 0)
    generator = torch.Generator().manual_seed(0)
    moved = {n: Dense(0.5 * torch.randn(w.shape, generator=generator)) for n, w in site_weights(ctx.backbone).items()}
    with merged(ctx.backbone.denoiser, moved):
        method.hunt(ctx, other, 0)
    assert len(own.words) == len(own.prompts) == 2
    assert not torch.allclose(own.words[1].tokens, other.words[1].tokens), "the word does not see the erased model"

    pools = method.last_pools(ctx, own)
    assert len(pools) == 2, "the concept's own words, and the one that was learned"
    assert len(pools[1].cond) == SMALL["trajectories"], "prompts are drawn from the templates, one for each trajectory"
    erasure = method.erase(ctx)
    assert not torch.allclose(
        _weights(erasure),
        _weights(Stereo(StereoConfig(**SMALL | {"loops": 0}, scope=scope(ctx.backbone), anchor="neutral")).erase(ctx)),
    )


def _weights(erasure):
    return torch.cat([to_dense(delta).flatten() for delta in summed([erasure.total()]).values()])


def test_what_no_text_reaches_is_trained_by_default(ctx):
    layers = Stereo(StereoConfig()).layers(ctx)
    assert layers
    assert not [name for name in layers if ".attn2." in name or ".attn." in name]


def test_words_are_sent_to_the_neutral_words_at_every_site(wide):
    """After a round the sites read the learned words in the concept's templates as its neutral words."""
    ctx = RunContext(wide, (Words().concept("cat"),), Words(), component=default().components.get)
    concept, backbone = ctx.concepts[0], ctx.backbone
    config = harden.WordsConfig(rounds=1, words=2, word_steps=5, word_lr=0.05, images=3)
    base = site_weights(backbone)
    hardened = harden.Words(config)(ctx, {"cat": {}}, Settings())
    x0, _ = images_of(ctx, harden.concept_prompts(concept, ctx.prompts("erase")), 3, ctx.generator("harden/images/cat"))
    word = learned(ctx, concept, x0, name="harden/cat/0/1", steps=5, batch=4, lr=0.05)
    goals = backbone.encode([concept.neutralise(t.format(concept.phrases[0])) for t in concept.templates])
    mine = read(ctx, word, concept.templates)
    for site in backbone.text_sites():
        old = base[site.name]
        new = old + to_dense(hardened["cat"][site.name]).to(old)
        w_ND, u_ND = align(mine, goals) if site.reads == "tokens" else (mine.pooled.double(), goals.pooled.double())
        before, after = ((w_ND @ w.T - u_ND @ old.T).norm() for w in (old, new))
        assert after < 0.5 * before, site.name


def test_trajectories_are_drawn_under_all_prompts_each_with_its_own_others(ctx):
    method = Stereo(StereoConfig(**SMALL))
    texts = [f"a photo of a {word}" for word in ("cat", "dog", "ship", "thing", "kitten", "red")]
    prompts = ctx.backbone.encode(texts)
    seen = set()
    for k in range(6):
        pool = method._pool(ctx, prompts, f"draw/{k}", [prompts])
        assert len(pool.cond) == 3
        assert torch.equal(pool.predictions[:, 1], pool.predictions[:, 2]), "a prompt met another one's row"
        seen |= {i for i in range(6) for own in range(3) if torch.equal(pool.cond.tokens[own], prompts.tokens[i])}
    assert len(seen) > 3, "only the first prompts are drawn"
