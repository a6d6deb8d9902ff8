"""SPEED: its parts against plain numpy, and what it promises of the layers it edits."""

import numpy as np
import pytest
import torch

from erasekit.erasures.deltas import to_dense
from erasekit.methods.closedform import Pairs
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import preserve_prompts
from erasekit_speed.method import Speed, SpeedConfig, embedded
from erasekit_speed.solve import affected, augmented, invariants, null_projector, speed, unconstrained
from tests.third_party.tiny_world import Words

D = 12


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs_of(w, u):
    return Pairs.empty(D).add(w, u)


@pytest.mark.parametrize(("concepts", "lamb"), [(1, 0.0), (3, 0.0), (2, 0.5)])
def test_the_edit_is_the_papers_formula(concepts, lamb):
    w, u = [normal(2, D, seed=k) for k in range(concepts)], [normal(2, D, seed=9 + k) for k in range(concepts)]
    kept, held = normal(5, D, seed=20).numpy(), normal(D, 2, seed=21).numpy()
    values, vectors = np.linalg.eigh(kept.T @ kept / 5)
    null = vectors[:, values < 0.1] @ vectors[:, values < 0.1].T
    eye = np.eye(D)
    target = sum(a.numpy().T @ a.numpy() for a in w) / concepts
    anchor = sum(b.numpy().T @ a.numpy() for a, b in zip(w, u, strict=True)) / concepts
    m = np.linalg.inv(target @ null + 0.7 * eye)
    inner = np.linalg.inv(held.T @ null @ m @ held + lamb * np.eye(2))
    wanted = (anchor - target) @ null @ (eye - m @ held @ inner @ held.T @ null) @ m
    pairs = [pairs_of(a, b) for a, b in zip(w, u, strict=True)]
    edits = speed(pairs, null_projector(torch.tensor(kept.T @ kept / 5), 0.1), torch.tensor(held), scale=0.7, lamb=lamb)
    found = sum(edit.difference_DN @ edit.read_ND for edit in edits).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-9 * np.abs(wanted).max())
    assert np.abs(found @ kept.T).max() < 1e-9, "what must stay moves"
    if not lamb:
        assert np.abs(found @ held).max() < 1e-9, "an invariant moves"


def test_what_is_filtered_and_augmented():
    rows, edit = normal(40, D, seed=1), torch.diag(torch.tensor([1.0, *[0.0] * (D - 1)], dtype=torch.float64))
    kept = affected(rows, edit)
    assert 0 < len(kept) < 40
    assert kept[:, 0].abs().min() > rows[:, 0].abs().mean() - 1e-12
    weight = torch.linalg.qr(normal(D, D, seed=2)).Q.double() * torch.linspace(1, 0.01, D, dtype=torch.float64)[:, None]
    more = augmented(rows, weight, normal(D, D, seed=3), 4, torch.Generator().manual_seed(0))
    assert torch.equal(more[:40], rows)
    assert 40 < len(more) < 200
    noise = (more[40:, None] - rows[None]).norm(dim=2).argmin(1)
    moved = more[40:] - rows[noise]
    assert ((moved @ weight.T).norm(dim=1) < 0.02 * moved.norm(dim=1) + 1e-9).all(), "the layer reads the noise"
    assert augmented(rows, weight, edit, 0, torch.Generator()) is rows


def test_the_edit_without_constraints_is_a_ridge_solution():
    w, u = normal(3, D, seed=1), normal(3, D, seed=2)
    pairs = pairs_of(w, u)
    left = np.concatenate([w.numpy(), np.eye(D)])
    right = np.concatenate([(u - w).numpy(), np.zeros((D, D))])
    wanted = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(unconstrained(pairs.change_DD, pairs.ww_DD).numpy(), wanted, atol=1e-10)


def test_invariants_are_the_first_token_and_the_centres_of_the_others():
    groups = [torch.full((4, D), float(k)) + 0.01 * normal(4, D, seed=k) for k in (1, 5, 9)]
    rows = torch.cat([torch.zeros(1, D), *groups]).double()
    held = invariants(rows, 3)
    assert held.shape == (D, 4)
    assert torch.equal(held[:, 0], rows[0])
    means = sorted(held[:, 1:].mean(0).tolist())
    np.testing.assert_allclose(means, [1, 5, 9], atol=0.02)
    assert invariants(rows[:1], 3).shape == (D, 1)


def test_the_empty_prompt_stays_and_concepts_go_to_their_neutral_words(wide):
    task = Words()
    ctx = RunContext(wide, (task.concept("cat"), task.concept("dog")), task)
    erasure = Speed(SpeedConfig(tokens="last", bare=True, scale=1e-3, threshold=1e-6, augment=0, filter=False)).erase(ctx)
    total = erasure.total()
    sites = [site for site in wide.text_sites() if site.name in total]
    assert sites
    assert all(site.name.endswith("to_v") for site in sites) == (wide.prefix == "unet")
    for site in sites:
        delta = to_dense(total[site.name]).double()
        weight = wide.weight(site.name).double()
        empty = embedded(wide, [""], site.reads)
        assert (empty[:1] @ delta.T).norm() < 1e-6 * (empty[:1] @ weight.T).norm()
        for concept in ctx.concepts:
            phrase = concept.phrases[0]
            mine, goal = (embedded(wide, [p], site.reads, last=True) for p in (phrase, concept.neutralise(phrase)))
            left = (mine @ (weight + delta).T - goal @ weight.T).norm() / ((mine - goal) @ weight.T).norm()
            assert left < 0.2, f"{left:.2f} of '{phrase}' is left at {site.name}"


def test_where_nothing_is_named_the_empty_prompts_other_positions_must_stay(wide):
    """As in the published code; the empty prompt's first token, what concepts become there, is held by itself."""

    class Alone(Words):
        def prompts(self, which, concepts, split, limit=None):
            return [] if which == "preserve" else super().prompts(which, concepts, split, limit)

    ctx = RunContext(wide, (Alone().concept("cat").model_copy(update={"preserve": ()}),), Alone())
    method = Speed(SpeedConfig())
    empty = embedded(wide, [""], "tokens")
    assert torch.equal(method.kept(ctx, "tokens", empty), empty[1:])
    assert torch.equal(method.kept(ctx, "pooled", empty[:1]), empty[:1])
    ctx = RunContext(wide, (Words().concept("cat"),), Words())
    assert len(method.kept(ctx, "tokens", empty)) == len([p for p in preserve_prompts(ctx) if p])
