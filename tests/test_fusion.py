"""Fusion against least squares written out, and the moments it is made of against what the layers read."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erasekit.erasures.deltas import Dense, LowRank, to_dense
from erasekit.methods import closedform
from erasekit.methods.context import RunContext
from erasekit.methods.fusion import Read, fuse, input_moments
from erasekit.testing import tiny, tiny_flux
from tests.third_party.tiny_world import Words

WIDTH, OUT = 10, 6


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deficient(n, rank, seed):
    """n rows that span `rank` directions, well conditioned within them."""
    basis = torch.linalg.qr(normal(WIDTH, rank, seed=seed)).Q
    left = torch.linalg.qr(normal(max(n, rank), rank, seed=seed + 1)).Q[:n]
    return left @ basis.T


def moment(rows):
    return rows.T @ rows


def moments(inputs):
    return [moment(rows) for rows in inputs]


def least_squares(blocks, ridge):
    """The least-norm D that minimises sum |D x - y|^2 over blocks of rows (x, y), plus ridge |D|^2, by stacking."""
    x, y = (np.concatenate([b[k].numpy() for b in blocks]) for k in (0, 1))
    x = np.concatenate([x, np.sqrt(ridge) * np.eye(WIDTH)])
    y = np.concatenate([y, np.zeros((WIDTH, y.shape[1]))])
    return np.linalg.lstsq(x, y, rcond=1e-11)[0].T


def diagonal(*weighted):
    return sum(float((scale * x.square()).sum()) for scale, x in weighted) / WIDTH


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-8 * max(1.0, np.abs(b).max()))


problems = {
    "n": st.integers(1, 14),
    "m": st.integers(0, 14),
    "rank": st.integers(1, WIDTH),
    "lamb": st.sampled_from([0.0, 1e-3, 0.5]),
    "scale": st.sampled_from([0.01, 1.0, 30.0]),
    "seed": st.integers(0, 10_000),
}


@settings(max_examples=60, deadline=None)
@given(**problems)
def test_the_refinement_of_mace_is_the_least_squares_solution(n, m, rank, lamb, scale, seed):
    f, g, p, weight = (
        deficient(n, rank, seed),
        normal(n, WIDTH, seed=seed + 2),
        deficient(m, rank, seed + 3),
        normal(OUT, WIDTH),
    )
    pairs = closedform.Pairs.empty(WIDTH).add(f, g)
    (edit,) = closedform.uce([pairs], moment(p), lamb=lamb, preserve_scale=scale, error=0)
    kept_rows = (scale**0.5 * p, torch.zeros(m, OUT, dtype=torch.float64))
    want = least_squares([(f, (g - f) @ weight.T), kept_rows], lamb * diagonal((1, f), (scale, p)))
    close(to_dense(edit.delta(weight)).numpy(), want)


@settings(max_examples=60, deadline=None)
@given(concepts=st.integers(1, 3), **problems)
def test_fusion_is_the_least_squares_solution(concepts, n, m, rank, lamb, scale, seed):
    inputs = [deficient(n, rank, seed + 10 * i) for i in range(concepts)]
    changes = [LowRank(normal(OUT, 1 + i, seed=seed + i), normal(1 + i, WIDTH, seed=seed - i - 1)) for i in range(concepts)]
    p = deficient(m, rank, seed + 5)
    read = Read(["layer"], moments(inputs), moment(p))
    edits = fuse([{"layer": change} for change in changes], [read], ridge=lamb, preserve_scale=scale)
    shares = [edit["layer"] for edit in edits]
    blocks = [(x, x @ to_dense(change).T) for x, change in zip(inputs, changes, strict=True)]
    blocks.append((scale**0.5 * p, torch.zeros(m, OUT, dtype=torch.float64)))
    ridge = lamb * diagonal(*((1, x) for x in inputs), (scale, p))
    fused = sum(to_dense(s) for s in shares)
    close(fused.numpy(), least_squares(blocks, ridge))
    assert all(share.rank <= change.rank for share, change in zip(shares, changes, strict=True))


def test_a_dense_change_is_fused_as_its_factors_are():
    change = LowRank(normal(OUT, 2), normal(2, WIDTH, seed=1))
    whole, factors = (
        fused(c, normal(9, WIDTH), normal(4, WIDTH), ridge=0.1, preserve_scale=1.0) for c in (Dense(to_dense(change)), change)
    )
    assert whole.rank == factors.rank == 2
    close(to_dense(whole).numpy(), to_dense(factors).numpy())


def fused(change, x, p, **scales):
    """The share of one change in one layer."""
    (edit,) = fuse([{"layer": change}], [Read(["layer"], moments([x]), moment(p))], **scales)
    return edit["layer"]


def test_preservation_pulls_the_fused_edit_off_what_is_kept():
    x, p, change = normal(4, WIDTH), normal(6, WIDTH, seed=1), LowRank(normal(OUT, 1), normal(1, WIDTH, seed=2))
    drift = []
    for scale in (0.01, 1.0, 100.0):
        drift.append(float((to_dense(fused(change, x, p, ridge=1e-6, preserve_scale=scale)) @ p.T).norm()))
    assert drift[0] > drift[1] > drift[2]
    free = fused(change, x, p[:0], ridge=0.0, preserve_scale=1.0)
    close((to_dense(free) @ x.T).numpy(), (to_dense(change) @ x.T).numpy())


# What layers read


def test_moments_are_of_what_the_layers_read(tiny_folder):
    backbone = tiny.load(tiny_folder)
    ctx = RunContext(backbone, (Words().concept("cat"),), Words())
    cond = backbone.encode(["a cat", "a photo of a dog", "a ship"])
    x, tau = backbone.latents([0, 1, 2]), torch.tensor([0.1, 0.5, 0.9])
    sites = [site.name for site in backbone.text_sites()]
    rows = cond.tokens.double()
    for found in input_moments(ctx, sites, x, tau, cond).values():  # keys and values read the text itself
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, moment(rows.flatten(0, 1)))
    assert not any(module._forward_pre_hooks for module in backbone.denoiser.modules())


def test_moments_do_not_depend_on_the_batch(tiny_flux_folder):
    backbone, layer = tiny_flux.load(tiny_flux_folder), "transformer_blocks.1.attn.add_k_proj"
    cond, x, tau = backbone.encode(["a cat", "a photo of a dog"]), backbone.latents([0, 1]), torch.tensor([0.1, 0.8])
    ctx = RunContext(backbone, (Words().concept("cat"),), Words())
    whole = input_moments(ctx, [layer], x, tau, cond)[layer]
    ctx.protocol = ctx.protocol.model_copy(update={"batch": 1})
    torch.testing.assert_close(input_moments(ctx, [layer], x, tau, cond)[layer], whole, rtol=1e-4, atol=1e-4)
