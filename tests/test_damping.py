"""The damping of TRACE's closed form, chosen on validation prompts."""

import torch

from erasekit.deltas import Dense, to_dense
from erasekit.method import RunContext
from erasekit_trace.method import ETAS, Trace, TraceConfig, choose_eta
from tests import tiny
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
    ctx = RunContext(backbone, (task.concept("cat"),), task)
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
    ctx = RunContext(sd, (task.concept("cat"),), task)
    whole, chosen = (Trace(TraceConfig(eta=eta)).refine(ctx)["cat"] for eta in (1.0, None))
    eta = choose_eta(ctx, whole)
    assert eta in ETAS
    half = Trace(TraceConfig(eta=0.5)).refine(ctx)["cat"]
    for module in whole:
        full = to_dense(whole[module])
        tolerance = {"rtol": 1e-3, "atol": 1e-5 * full.abs().max().item()}
        torch.testing.assert_close(to_dense(half[module]), 0.5 * full, **tolerance)
        torch.testing.assert_close(to_dense(chosen[module]), eta * full, **tolerance)
