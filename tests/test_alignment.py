import pytest
import torch

from erasekit.backbones.alignment import align
from erasekit.backbones.protocol import Conditioning
from erasekit.testing import tiny

PADS = list(range(7, tiny.LENGTH))


@pytest.fixture(scope="module")
def encode(tiny_folder):
    return tiny.load(tiny_folder).encode


# Positions: 0 the begin token, then the words, the end token and the pads up to 15. Each row holds a concept's prompt,
# its neutral prompt, the first position that differs, and for every position from there on its partner.
@pytest.mark.parametrize(
    ("concept", "neutral", "start", "partners"),
    [
        pytest.param("a photo of a cat", "a photo of a thing", 5, [5, 6, *PADS], id="equal"),
        pytest.param("cat", "thing", 1, [1, 2, 3, 4, 5, 6, *PADS], id="from the first word"),
        pytest.param("a cat by the ship", "a red thing by the ship", 2, [3, 4, 5, 6, 7, 2, *PADS[1:]], id="longer neutral"),
        pytest.param("a red cat by the ship", "a thing by the ship", 2, [7, 2, 3, 4, 5, 6, *PADS[1:]], id="shorter neutral"),
        pytest.param("a photo of a cat", "", 1, [2, 3, 4, 5, 6, 1, *PADS], id="empty neutral"),
        pytest.param("a photo of a ship", "a photo of a ship", 16, [], id="the concept is not in it"),
    ],
)
def test_partners_of_every_position(encode, concept, neutral, start, partners):
    one, two = encode([concept]), encode([neutral])
    mine, goal = align(one, two)
    assert mine.dtype == goal.dtype == torch.float64
    assert torch.equal(mine, one.tokens[0, start:].double())
    assert torch.equal(goal, two.tokens[0][torch.tensor(partners, dtype=torch.long)].double())


def test_every_embedding_has_one_partner(encode):
    """Attention does not see the order of text tokens: equal sets make equal predictions, whatever the token counts."""
    for concept, neutral in [
        ("cat by the ship", "a red thing by the ship"),
        ("a red kitten in the style", "thing in the style"),
    ]:
        one, two = encode([concept]), encode([neutral])
        mine, goal = align(one, two)
        rest = two.tokens[0, tiny.LENGTH - len(mine) :].double()
        assert len(goal.unique(dim=0)) == len(rest.unique(dim=0))
        assert torch.equal(goal.sort(0).values, rest.sort(0).values)


def test_prompts_follow_one_another(encode):
    one, two = encode(["a cat", "a photo of a cat"]), encode(["a thing", "a photo of a red thing"])
    together = align(one, two)
    apart = [align(one[[i]], two[[i]]) for i in (0, 1)]
    for k in (0, 1):
        assert torch.equal(together[k], torch.cat([pair[k] for pair in apart]))
    assert len(together[0]) == (16 - 2) + (16 - 5)


def test_noise_of_the_encoder_is_no_difference():
    tokens = torch.randn(1, 6, 3, dtype=torch.float64)
    changed = tokens.clone()
    changed[0, 1] += 1e-6
    changed[0, 4] += 0.1
    ids, length = torch.arange(6)[None], torch.tensor([5])
    mine, goal = align(Conditioning(changed, None, ids, length), Conditioning(tokens, None, ids, length))
    assert torch.equal(mine, changed[0, 4:])
    assert torch.equal(goal, tokens[0, 4:])


def test_prompts_without_a_counterpart_are_an_error(encode):
    with pytest.raises(ValueError, match="shorter"):
        align(encode(["a cat", "a dog"]), encode(["a thing"]))
