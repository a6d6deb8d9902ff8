"""The stage that trains the denoiser not to finish a concept: its target against the backbone's own x0, and what it moves."""

import torch

from erasekit.erasures.deltas import merged
from erasekit.methods.images import noised
from erasekit_stereo import blind


def test_the_target_is_the_prediction_that_ends_in_the_goal(backbone):
    x, goal, tau = backbone.latents([0, 1], 16), backbone.latents([2, 3], 16), torch.tensor([0.25, 0.5])
    target, rate = blind.towards(backbone, x, goal, tau)
    assert torch.allclose(backbone.to_x0(target, x, tau), goal, atol=1e-4)
    assert rate.shape == x.shape


def test_images_of_the_concept_are_finished_as_something_else_and_the_rest_is_held(ctx):
    backbone, concept = ctx.backbone, ctx.concepts[0]
    small = {"words": 1, "word_steps": 2, "blind_images": 3, "batch": 6, "blind_steps": 25, "blind_lr": 1e-2, "blind_rank": 4}
    settings = blind.Blinding(**small)
    deltas = ctx.component("robustify", "blind")(ctx, {"cat": {}}, settings)
    assert set(deltas) == {"cat"}
    text = {site.name for site in backbone.text_sites()}
    assert set(deltas["cat"]) - text, "more is trained than what reads text"
    seen = blind._seen(ctx, concept, settings)
    tau = torch.full((3,), 0.5)
    x = noised(ctx, seen.shown, tau, torch.Generator().manual_seed(0))
    target, rate = blind.towards(backbone, x, seen.goals, tau)

    @torch.no_grad()
    def errors():
        found = [
            ((ctx.predict(x, tau, side[[0]].repeat(3)) - target) * rate).square().mean()
            for side in (seen.asked, seen.others[0])
        ]
        return torch.stack(found)

    before = errors()
    with merged(backbone.denoiser, deltas["cat"]):
        after = errors()
    assert (after < before).all()
