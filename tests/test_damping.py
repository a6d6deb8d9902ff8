"""The damping of TRACE's closed form, chosen on validation prompts."""

import torch

from erasekit.erasures.deltas import Dense, to_dense
from erasekit.erasures.remains import Remains, Residual
from erasekit.methods.context import RunContext
from erasekit.registration.plugins import default
from erasekit.testing import tiny
from erasekit_trace.config import TraceConfig
from erasekit_trace.eta import ETAS, choose_eta, cost
from erasekit_trace.method import Trace
from tests.third_party.tiny_world import Words


def edit_with(backbone, moves: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Dense]:
    """Deltas W M with a matrix M such that M x = d for every pair of rows (x, d), solved in float64."""
    rows, shifts = (torch.cat(column).double() for column in zip(*moves, strict=True))
    change = (torch.linalg.pinv(rows, rtol=1e-10) @ shifts).T
    assert (rows @ change.T - shifts).abs().max() < 1e-6
    modules = dict(backbone.denoiser.named_modules())
    return {s.name: Dense((modules[s.name].weight.double() @ change).float()) for s in backbone.text_sites()}


def test_eta_is_whole_where_preserved_prompts_stay_and_zero_where_only_they_move(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "WIDTH", 64)  # room for an edit of one prompt that leaves two others alone at every position
    backbone, task = tiny.load(tiny.save_pipeline(tmp_path / "sd")), Words()
    ctx = RunContext(backbone, (task.concept("cat"),), task, component=default().components.get)
    tokens = backbone.encode([*(f"a photo of a {w}" for w in ("cat", "thing", "ship")), ""]).tokens
    cat, thing, ship, empty = tokens
    first = 5  # where the prompts differ from each other
    still = [(row, torch.zeros_like(row)) for row in (cat, ship, empty)]
    erases = edit_with(backbone, [(cat[first:], (thing - cat)[first:]), *still[1:]])
    assert choose_eta(ctx, erases) == 1.0
    noise = torch.randn(ship[first:].shape, generator=torch.Generator().manual_seed(0))
    drifts = edit_with(backbone, [(ship[first:], noise), still[0], still[2]])
    assert choose_eta(ctx, drifts) == 0.0


def test_eta_left_out_is_chosen_and_given_is_used(sd):
    task = Words()
    ctx = RunContext(sd, (task.concept("cat"),), task, component=default().components.get)
    whole, chosen = (Trace(TraceConfig(eta=eta)).refine(ctx)["cat"] for eta in (1.0, None))
    eta = choose_eta(ctx, whole)
    assert eta in ETAS
    half = Trace(TraceConfig(eta=0.5)).refine(ctx)["cat"]
    for module in whole:
        full = to_dense(whole[module])
        tolerance = {"rtol": 1e-3, "atol": 1e-5 * full.abs().max().item()}
        torch.testing.assert_close(to_dense(half[module]), 0.5 * full, **tolerance)
        torch.testing.assert_close(to_dense(chosen[module]), eta * full, **tolerance)


def test_a_high_guidance_scale_does_not_turn_stage_1_off():
    """What the old criterion did at 7.5: a drift of 13 % counted as much as the whole concept."""

    def of(residual, drift):
        return Remains(residual={"cat": Residual(prompts=residual, other_words=None)}, drift=drift)

    other = Remains(residual={"cat": Residual(prompts=0.1, other_words=0.4)}, drift=0.0)
    assert cost(other, 3.5) == cost(of(0.4, 0.0), 3.5)  # what is left under other words counts as much

    for guidance in (0.0, 1.0, 3.5, 7.5):
        assert cost(of(0.02, 0.3), guidance) < cost(of(1.0, 0.0), guidance)
    assert cost(of(0.3, 0.1), 7.5) > cost(of(0.02, 0.5), 7.5)  # a third of the concept shows at 7.5
    assert cost(of(0.02, 0.3), 7.5) < cost(of(0.02, 0.6), 7.5)


def test_a_stage_1_that_is_nearly_off_is_a_warning(sd):
    task = Words()
    for eta, warned in ((0.0, True), (0.25, True), (0.85, False)):
        ctx = RunContext(sd, (task.concept("cat"),), task, component=default().components.get)
        Trace(TraceConfig(eta=eta)).refine(ctx)
        assert bool(ctx.warnings) == warned
        assert ctx.shared["eta"] == eta
