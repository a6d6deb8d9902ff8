"""Token ids to encoded prompts: what `encode` gives bit for bit, and differentiable in the vectors of tokens."""

import pytest
import torch

from erasekit.backbones.protocol import BackboneConfig, Conditioning
from erasekit.registration import plugins

PROMPTS = ["", "a photo of a cat", "a dog by the ship", "a " * 60 + "cat"]


@pytest.fixture(scope="module", params=["sd15-mini", "flux-mini"])
def mini(request):
    kind = plugins.default().backbones.get(request.param)
    return kind.load(kind.Config(device="cpu"))


def same(one: Conditioning, other: Conditioning) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in vars(one)]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def test_ids_of_prompts_give_what_encode_gives(backbone):
    tokens = backbone.tokenize(PROMPTS)
    for i in range(len(PROMPTS)):  # one at a time, as `encode` does
        with torch.no_grad():
            found = backbone.embed({name: ids[[i]] for name, ids in tokens.items()})
        assert same(found, backbone.encode([PROMPTS[i]]))


def test_ids_of_prompts_give_what_encode_gives_on_the_mini_models(mini):
    for prompt in ("a photo of a cat", "two kitties on a red background", "a mushroom"):
        tokens = mini.tokenize([prompt])
        rows = {name: mini.lexicon(name).vectors[ids].clone().requires_grad_() for name, ids in tokens.items()}
        with torch.no_grad():
            assert same(mini.embed(tokens), mini.encode([prompt]))
        assert same(mini.embed(tokens, rows), mini.encode([prompt]))


def test_a_batch_agrees_to_rounding(backbone):
    with torch.no_grad():
        found = backbone.embed(backbone.tokenize(PROMPTS))
    known = backbone.encode(PROMPTS)
    assert torch.allclose(found.tokens, known.tokens, atol=1e-5)
    assert torch.equal(found.lengths, known.lengths)


def test_vectors_have_a_gradient_and_the_encoder_none(backbone):
    tokens = backbone.tokenize(["a photo of a cat"])
    for name, ids in tokens.items():
        vectors = backbone.lexicon(name).vectors[ids].clone().requires_grad_()
        given = dict(tokens)
        found = backbone.embed(given, {name: vectors})
        (found.tokens.square().sum() + (0 if found.pooled is None else found.pooled.square().sum())).backward()
        assert vectors.grad.abs().sum() > 0
        assert all(p.grad is None for p in backbone._part(name).parameters())


def test_what_is_not_given_is_taken_from_encoded_prompts(flux):
    cat, dog = ("a photo of a cat", "a photo of a dog")
    known = flux.encode([cat])
    with torch.no_grad():
        mixed = flux.embed({"text_encoder": flux.tokenize([dog])["text_encoder"]}, like=known)
    assert torch.equal(mixed.tokens, known.tokens)
    assert torch.equal(mixed.pooled, flux.encode([dog]).pooled)
    assert not torch.equal(mixed.pooled, known.pooled)


def test_a_lexicon_says_how_prompts_are_laid_out(backbone):
    for name, ids in backbone.tokenize(["a cat"]).items():
        lexicon = backbone.lexicon(name)
        words = ids[0, lexicon.begin : lexicon.begin + 2]
        assert lexicon.usable[words].all()
        assert backbone.spell(name, words) == "a cat"
        assert backbone.spell(name, ids[0]) == "a cat"
        assert ids[0, lexicon.begin + 2] == lexicon.end
        assert (ids[0, lexicon.begin + 3 :] == lexicon.pad).all()
        assert not lexicon.usable[[lexicon.end, lexicon.pad]].any()
        assert lexicon.begin == (1 if name == "text_encoder" else 0)
        assert len(lexicon.vectors) == len(lexicon.usable)


def test_images_become_latents_that_decode_to_them(mini):
    images = torch.zeros(2, 3, 64, 64)
    images[:, 0, 16:48, 16:48] = 0.8
    x0 = mini.to_latents(images)
    assert x0.shape == mini.latents([0, 1], 64).shape
    with torch.no_grad():
        assert (mini.decode(x0) - images).abs().mean() < 0.15


def test_latents_of_images_are_packed_as_the_denoiser_takes_them(backbone):
    size = 16
    x0 = backbone.to_latents(torch.zeros(1, 3, size, size))
    assert x0.shape == backbone.latents([0], size).shape


def test_a_backbone_names_its_encoders(backbone):
    assert set(backbone.encoders) == set(backbone.reads)
    assert BackboneConfig().path == ""
