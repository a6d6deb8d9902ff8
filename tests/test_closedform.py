"""The solvers against the same problems written down naively: loops over matrices, KKT systems, normal equations."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from erasekit.backbones.alignment import align
from erasekit.erasures.deltas import merged, to_dense
from erasekit.methods import closedform
from erasekit.methods.closedform import Pairs, TextEdit
from erasekit.testing import tiny

D, OUT = 12, 7


def rows(n, seed, width=D):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def problem():
    return {"w": rows(3, 1), "u": rows(3, 2), "p": rows(5, 3), "C": covariance(rows(60, 4)), "W": rows(OUT, 5)}


def dense(edits: TextEdit | list[TextEdit], weight: torch.Tensor) -> np.ndarray:
    edits = [edits] if isinstance(edits, TextEdit) else edits
    return sum(to_dense(edit.delta(weight)).numpy() for edit in edits)


def pairs(w, u) -> Pairs:
    return Pairs.empty(w.shape[1]).add(w, u)


def covariance(rows_ND):
    return rows_ND.double().T @ rows_ND.double() / len(rows_ND)


def whitened(w, u, covariance_DD, **settings):
    """The exact edit of one concept."""
    return closedform.whitened([pairs(w, u)], covariance_DD, error=0, **settings)[0]


def uce(w, u, p, **settings):
    """The exact edit of one concept."""
    return closedform.uce([pairs(w, u)], p.T @ p, error=0, **settings)[0]


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


def kkt(weight, concept, neutral, covariance, fix_neutral):
    """Row by row of Delta: minimise d C d^T subject to d K = r, through the (singular, consistent) KKT system."""
    w, u, c, matrix = (t.numpy() for t in (concept, neutral, covariance, weight))
    k = np.concatenate([w, u]).T if fix_neutral else w.T
    r = np.concatenate([(u - w) @ matrix.T, 0 * (u @ matrix.T)]).T if fix_neutral else ((u - w) @ matrix.T).T
    n, m = k.shape
    system = np.block([[2 * c, k], [k.T, np.zeros((m, m))]])
    return np.stack([np.linalg.lstsq(system, np.concatenate([np.zeros(n), row]), rcond=1e-13)[0][:n] for row in r])


def test_eq1_of_one_embedding_is_the_papers_formula(problem):
    w, u, matrix = problem["w"][0].numpy(), problem["u"][0].numpy(), problem["W"].numpy()
    want = np.outer(matrix @ u - matrix @ w, w) / (w @ w)
    close(dense(closedform.eq1(problem["w"][:1], problem["u"][:1]), problem["W"]), want)


def test_eq1_of_several_is_the_least_norm_solution(problem):
    w, u, matrix = (problem[k].numpy() for k in ("w", "u", "W"))
    want = np.stack([np.linalg.lstsq(w, (u - w) @ row, rcond=None)[0] for row in matrix])  # Delta w_i = W (u_i - w_i)
    close(dense(closedform.eq1(problem["w"], problem["u"]), problem["W"]), want)


def test_delta_projection_is_the_projector(problem):
    one = (problem["w"][0] - problem["u"][0]).numpy()
    projector = np.outer(one, one) / (one @ one)
    close(
        dense(closedform.delta_projection(problem["w"][:1], problem["u"][:1]), problem["W"]), -problem["W"].numpy() @ projector
    )
    q, _ = np.linalg.qr((problem["w"] - problem["u"]).numpy().T)
    close(dense(closedform.delta_projection(problem["w"], problem["u"]), problem["W"]), -problem["W"].numpy() @ q @ q.T)


@pytest.mark.parametrize("fix_neutral", [True, False])
def test_whitened_solves_the_kkt_system(problem, fix_neutral):
    edit = whitened(problem["w"], problem["u"], problem["C"], fix_neutral=fix_neutral)
    close(dense(edit, problem["W"]), kkt(problem["W"], problem["w"], problem["u"], problem["C"], fix_neutral))


def test_whitened_with_a_ridge_is_the_formula(problem):
    w, u, c, matrix = (problem[k].numpy() for k in ("w", "u", "C", "W"))
    k = np.concatenate([w, u]).T
    r = np.concatenate([(u - w) @ matrix.T, np.zeros((3, OUT))]).T
    gram = k.T @ np.linalg.inv(c) @ k
    want = r @ np.linalg.inv(gram + 0.3 * np.trace(gram) / 6 * np.eye(6)) @ k.T @ np.linalg.inv(c)
    close(dense(whitened(problem["w"], problem["u"], problem["C"], ridge=0.3), problem["W"]), want)


def test_whitened_moves_other_tokens_less_than_any_other_solution(problem):
    drift = lambda edit: float(np.trace(dense(edit, problem["W"]) @ problem["C"].numpy() @ dense(edit, problem["W"]).T))  # noqa: E731
    w, u = problem["w"], problem["u"]
    best = whitened(w, u, problem["C"])
    plain = whitened(w, u, torch.eye(D, dtype=torch.float64))
    assert drift(best) < drift(plain)
    assert drift(whitened(w, u, problem["C"], fix_neutral=False)) < drift(closedform.eq1(w, u))


@pytest.mark.parametrize(("lamb", "n_preserve"), [(0.5, 5), (1e-3, 5), (0.5, 0), (0.0, 30)])
def test_uce_is_the_loop_over_matrices(problem, lamb, n_preserve):
    w, u, matrix = (problem[k].numpy() for k in ("w", "u", "W"))
    p = rows(n_preserve, 8)
    erase, preserve = 0.7, 0.2
    c = sum(erase * np.outer(e, e) for e in w) + sum((preserve * np.outer(e, e) for e in p.numpy()), np.zeros((D, D)))
    pull = lamb * np.trace(c) / D
    left = pull * matrix + sum(erase * np.outer(matrix @ b, a) for a, b in zip(w, u, strict=True))
    left = left + sum((preserve * np.outer(matrix @ e, e) for e in p.numpy()), np.zeros_like(matrix))
    want = left @ np.linalg.inv(pull * np.eye(D) + c) - matrix
    edit = uce(problem["w"], problem["u"], p, lamb=lamb, erase_scale=erase, preserve_scale=preserve)
    close(dense(edit, problem["W"]), want)


def least_squares(w, u, p, weight, *, ridge, erase, preserve):
    """UCE's own objective minimised over the rows of Delta as one least-squares problem, of least norm if there are many."""
    w, u, p, matrix = (t.numpy() for t in (w, u, p, weight))
    left = np.concatenate([erase**0.5 * w, preserve**0.5 * p, ridge**0.5 * np.eye(w.shape[1])])
    right = np.concatenate([erase**0.5 * (u - w) @ matrix.T, np.zeros((len(p) + w.shape[1], len(matrix)))])
    return np.linalg.lstsq(left, right, rcond=1e-9)[0].T


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(0, 40)),
    rank=st.integers(1, D),
    ridge=st.sampled_from([0.0, 1e-3, 0.1, 2.0]),
    scales=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)),
    unit=st.sampled_from(["relative", "absolute"]),
    seed=st.integers(0, 999),
)
def test_uce_minimises_its_objective(sizes, rank, ridge, scales, unit, seed):
    """Also where embeddings are dependent or the same one comes up twice, with a ridge and without."""
    (n, m), (erase, preserve), basis = sizes, scales, torch.linalg.qr(rows(D, seed)).Q[:rank]
    together = rows(n + m, seed + 1, rank) @ basis
    w, p, u, matrix = together[:n], together[n:], rows(n, seed + 2), rows(OUT, 3)
    singular = torch.linalg.svdvals(torch.cat([erase**0.5 * w, preserve**0.5 * p]))[: min(rank, n + m)]
    assume(ridge > 0 or singular[-1] > 1e-2 * singular[0])  # else the problem itself has no stable answer
    mean = (erase * w.square().sum() + preserve * p.square().sum()).item() / D
    edit = uce(w, u, p, lamb=ridge, erase_scale=erase, preserve_scale=preserve, unit=unit)
    absolute = ridge * (mean if unit == "relative" else 1)
    close(dense(edit, matrix), least_squares(w, u, p, matrix, ridge=absolute, erase=erase, preserve=preserve), 1e-8)


@pytest.mark.parametrize(("ridge", "unit", "warns"), [(1e-3, "relative", 0), (1e-7, "relative", 1), (1e-3, "absolute", 1)])
def test_a_ridge_that_does_nothing_is_said(problem, caplog, ridge, unit, warns):
    w = 100 * problem["w"]
    uce(w, problem["u"], problem["p"], lamb=ridge, erase_scale=1.0, preserve_scale=1.0, unit=unit)
    assert ["negligible" in record.message for record in caplog.records] == [True] * warns


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), repeats=st.integers(1, 4), same=st.integers(0, 2), seed=st.integers(0, 999))
def test_whitened_with_repeated_and_unchanged_tokens(n, repeats, same, seed):
    """Pads come up many times and BOS is the same in both prompts: K loses rank, the constraints still hold exactly."""
    assume(2 * n + same <= D)
    w, u, fixed = rows(n, seed), rows(n, seed + 1000), rows(same, seed + 2000)
    concept, neutral = torch.cat([w] * repeats + [fixed] * 2), torch.cat([u] * repeats + [fixed] * 2)
    spread, matrix = covariance(rows(50, seed + 3000)), rows(OUT, 7)
    delta = torch.from_numpy(dense(whitened(concept, neutral, spread), matrix))
    size = (matrix @ (w - u).T).norm()
    assert ((matrix + delta) @ w.T - matrix @ u.T).norm() < 1e-8 * size
    assert (delta @ u.T).norm() < 1e-8 * size
    assert (delta @ fixed.T).norm() <= 1e-8 * size
    unique = whitened(torch.cat([w, fixed]), torch.cat([u, fixed]), spread)
    close(delta.numpy(), dense(unique, matrix), 1e-7)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), rank=st.integers(1, D), seed=st.integers(0, 999), solver=st.sampled_from(["eq1", "delta", "uce"]))
def test_rank_deficient_problems_stay_finite_and_least_squares(n, rank, seed, solver):
    basis = rows(rank, seed)
    w = rows(n, seed + 1, rank) @ basis
    u, matrix = rows(n, seed + 2), rows(OUT, 3)
    if solver == "eq1":
        edits = closedform.eq1(w, u)
        want = np.stack([np.linalg.lstsq(w.numpy(), ((u - w) @ row).numpy(), rcond=1e-10)[0] for row in matrix])
        close(dense(edits, matrix), want, 1e-6)
    elif solver == "delta":
        difference = rows(n, seed + 4, rank) @ basis
        edits = closedform.delta_projection(w, w - difference)
        assert ((matrix + torch.from_numpy(dense(edits, matrix))) @ difference.T).abs().max() < 1e-7
    else:
        edits = [uce(w, u, w[:0], lamb=0.1)]
    assert all(edit.read_ND.isfinite().all() for edit in edits)


def test_pairs_are_the_sums_over_their_rows(problem):
    """However they come in, in whatever type; wider than a block, of which one half is multiplied out."""
    w, u = rows(9, 1, 1100), rows(9, 2, 1100)
    found = Pairs.empty(1100).add(w[:4], u[:4]).add(w[4:], u[4:], weight=0.25)
    weight = torch.tensor([1.0] * 4 + [0.25] * 5, dtype=torch.float64)[:, None]
    close(found.ww_DD.numpy(), (weight * w).T.numpy() @ w.numpy())
    close(found.uu_DD.numpy(), (weight * u).T.numpy() @ u.numpy())
    close(found.change_DD.numpy(), (weight * (u - w)).T.numpy() @ w.numpy())
    assert found.count == pytest.approx(4 + 5 / 4)
    half = Pairs.empty(D).add(problem["w"].bfloat16(), problem["u"].bfloat16())
    close(half.ww_DD.numpy(), problem["w"].bfloat16().double().T.numpy() @ problem["w"].bfloat16().double().numpy())


def test_mapped_pairs_are_those_of_mapped_rows(problem):
    w, u, a = problem["w"], problem["u"], rows(D, 9)
    found, want = pairs(w, u).mapped(a), pairs(w @ a.T, u)
    for name in ("ww_DD", "uu_DD", "change_DD"):
        close(getattr(found, name).numpy(), getattr(want, name).numpy())


def test_shares_of_a_joint_solve_sum_to_it(problem):
    w, u, p, c, matrix = (problem[k] for k in ("w", "u", "p", "C", "W"))
    split = [pairs(w[:1], u[:1]), pairs(w[1:], u[1:])]
    shares = closedform.uce(split, p.T @ p, lamb=0.1, error=0)
    close(dense(shares, matrix), dense(uce(w, u, p, lamb=0.1), matrix))
    assert [len(share.read_ND) for share in shares] == [1, 2]
    close(dense(closedform.whitened(split, c, ridge=0.2, error=0), matrix), dense(whitened(w, u, c, ridge=0.2), matrix))


def test_a_hundred_concepts_keep_the_rank_of_their_own_embeddings():
    """100 concepts in 3 templates, with more preserved tokens than dimensions."""
    w, u, p = (rows(n, seed, 96) for n, seed in ((300, 1), (300, 2), (200, 3)))
    of_each = [pairs(*side) for side in zip(w.split(3), u.split(3), strict=True)]
    assert {len(share.read_ND) for share in closedform.uce(of_each, p.T @ p, lamb=1e-3)} == {3}
    assert len(uce(w, u, p, lamb=1e-3).read_ND) == 96


@settings(max_examples=40, deadline=None)
@given(error=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 0.6]), n=st.integers(1, 200), seed=st.integers(0, 99))
def test_a_cut_costs_no_more_than_its_bound_and_one_rank_less_would(error, n, seed):
    """Against the full SVD of the edit times the root of its system, with singular values over many orders of ten."""
    width = 90
    falling = torch.logspace(0, -7, width, dtype=torch.float64)
    w, u = rows(n, seed, width) * falling, rows(n, seed + 500, width) * falling
    root = closedform.inverse_root(w.T @ w, ridge=1e-9)
    whole = (u - w).T @ w @ root @ root.T
    edit = closedform.cut((u - w).T @ w, root, error=error)
    system = torch.linalg.inv(root)  # its rows are what the mean is over
    left = (whole - edit.difference_DN @ edit.read_ND) @ system.T
    size = (whole @ system.T).norm()
    assert left.norm() <= max(error, 1e-9) * 1.001 * size
    values = torch.linalg.svdvals(whole @ system.T)
    least = int((values.square().flip(0).cumsum(0).flip(0).sqrt() > max(error, 1e-12) * size).sum())
    assert len(edit.read_ND) <= (least + 1 if error else width)
    orthonormal = edit.difference_DN.T @ edit.difference_DN
    close(orthonormal.numpy(), np.eye(len(orthonormal)))


def test_an_edit_of_the_same_numbers_has_the_same_bytes():
    w, u = rows(30, 1, 200), rows(30, 2, 200)
    one, two = (closedform.uce([pairs(w, u)], torch.eye(200).double(), lamb=0.1)[0] for _ in range(2))
    assert torch.equal(one.difference_DN, two.difference_DN)
    assert torch.equal(one.read_ND, two.read_ND)


def test_the_papers_edits_keep_what_they_promise_for_each_of_several_concepts(problem):
    """W' e_w = W e_u for Eq. 1 and W' e_w = W' e_u for Prop. 3.2, where concepts are not orthogonal; a rank each."""
    w, u, matrix = (problem[k] for k in ("w", "u", "W"))
    assert abs(float(torch.nn.functional.cosine_similarity(w[0], w[1], dim=0))) > 0.05
    edits = closedform.eq1(w, u)
    after = matrix + torch.from_numpy(dense(edits, matrix))
    close((after @ w.T).numpy(), (matrix @ u.T).numpy())
    assert [edit.read_ND.shape for edit in edits] == [(1, D)] * 3
    apart = matrix + sum(torch.from_numpy(dense(closedform.eq1(w[[i]], u[[i]]), matrix)) for i in range(3))
    assert (apart @ w.T - matrix @ u.T).abs().max() > 0.1  # what the sum of the paper's terms would leave
    edits = closedform.delta_projection(w, u)
    after = matrix + torch.from_numpy(dense(edits, matrix))
    close((after @ w.T).numpy(), (after @ u.T).numpy())
    assert [edit.read_ND.shape for edit in edits] == [(1, D)] * 3


def test_deltas_of_several_edits_are_those_of_each(problem):
    parts = closedform.eq1(problem["w"], problem["u"])
    for delta, part in zip(closedform.layer_deltas(parts, problem["W"].float()), parts, strict=True):
        close(to_dense(delta).numpy(), dense(part, problem["W"].float()))


def test_hard_constraints_hold_at_every_site_of_a_real_unet(tmp_path):
    """After `whitened`, W'e_w = W e_u and e_u stays, to 1e-5 of |W (e_w - e_u)|, with the weights and the files in float32."""
    backbone = tiny.load(tiny.save_pipeline(tmp_path / "sd"))
    w, u = (side[:6] for side in align(backbone.encode(["a cat"]), backbone.encode(["a thing"])))  # 12 < 32 dimensions
    captions = backbone.encode(["a photo of a dog", "a red ship", "the style of vint", ""]).tokens.flatten(0, 1)
    spread = covariance(captions) + 1e-3 * torch.eye(tiny.WIDTH, dtype=torch.float64)
    edit = whitened(w, u, spread)
    modules = dict(backbone.denoiser.named_modules())
    before = {site.name: modules[site.name].weight.detach().clone().double() for site in backbone.text_sites()}
    with merged(backbone.denoiser, {name: edit.delta(weight) for name, weight in before.items()}):
        for name, weight in before.items():
            after = modules[name].weight.detach().double()
            reach = ((w - u) @ weight.T).norm()
            assert (w @ after.T - u @ weight.T).norm() < 1e-5 * reach
            assert (u @ after.T - u @ weight.T).norm() < 1e-5 * reach


def test_an_edit_stays_what_it_is_and_equals_itself_alone():
    edit = closedform.TextEdit(torch.ones(3, 1), torch.ones(1, 3))
    with pytest.raises(FrozenInstanceError):
        edit.read_ND = None
    assert closedform.TextEdit(**vars(edit)) != edit


def test_where_there_is_no_embedding_nothing_is_solved():
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert closedform.inverse_root(zero, ridge=0.0).shape == (4, 0)
    assert not closedform.ridge_solve(zero, torch.ones(4, 2, dtype=torch.float64), ridge=0.0).any()
