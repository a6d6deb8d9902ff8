"""The CLIP that methods look at natural images with: real classes at a tiny size, from a folder as the hub has it."""

from functools import partial

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from erasekit.errors import EnvironmentProblem
from erasekit.evaluation.scorer import ClipScorer
from erasekit.methods.context import RunContext
from erasekit.testing import tiny
from erasekit_trace.divergence import clip
from tests.third_party.tiny_world import Words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    text = tiny.text_config(tiny.tokenizer(folder)).to_dict() | {"projection_dim": 12}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    vision |= {"patch_size": 8, "projection_dim": 12}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return str(folder)


def test_both_sides_are_unit_vectors_of_one_width_and_images_have_a_gradient(folder):
    scorer = ClipScorer(folder)
    images = torch.rand(3, 3, 40, 24, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).requires_grad_()
    image, text = scorer.image(images), scorer.text(["a photo of a cat", "a dog"])
    assert (image.shape, text.shape) == ((3, 12), (2, 12))
    for vectors in (image, text):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    (image @ text.T).sum().backward()
    assert images.grad.abs().sum() > 0


def test_it_is_the_whole_models_own_similarity(folder):
    scorer, model = ClipScorer(folder), CLIPModel.from_pretrained(folder).eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = scorer._tokenizer(["a photo of a cat"], return_tensors="pt")
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        want = model(**tokens, pixel_values=pixels).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(scorer.image(images) @ scorer.text(["a photo of a cat"]).T, want, rtol=1e-4, atol=1e-5)


def test_trace_can_train_on_it(folder, sd):
    task = Words()
    ctx = RunContext(sd, (task.concept("cat"),), task, component=lambda slot, name: partial(ClipScorer, folder))
    divergence = clip(ctx, ctx.concepts[0], None)
    one, two = torch.randn(2, 1, *sd.latents([0], 16).shape[1:], generator=torch.Generator().manual_seed(0)).unbind(0)
    values = [divergence(x0, goal) for x0, goal in ((one.requires_grad_(), two), (two, one))]
    assert sorted(value.item() > 0 for value in values) == [False, True]  # only more of the concept than the target costs
    (values[0] if values[0] > 0 else divergence(two.requires_grad_(), one)).backward()
    assert any(x0.grad is not None and x0.grad.abs().sum() > 0 for x0 in (one, two))


def test_a_folder_without_it_is_one_line(tmp_path):
    with pytest.raises(EnvironmentProblem, match="CLIP cannot be loaded from") as caught:
        ClipScorer(str(tmp_path))
    assert "\n" not in str(caught.value)
