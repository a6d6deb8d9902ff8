"""Distances of sets of features, against the formulas written out and against a library."""

import numpy as np
import pytest
import torch

from erasekit.evaluation.distances import cubic, gaussian, mmd


def features(n: int, seed: int, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + seed / 10


@pytest.mark.parametrize(("n", "m"), [(7, 7), (9, 4)])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(
    ("kernel", "of"),
    [
        (cubic, lambda a, b: (a @ b / len(a) + 1) ** 3),
        (gaussian, lambda a, b: np.exp(-((a - b) ** 2).sum() / 200)),
    ],
)
@pytest.mark.parametrize("rows", [1024, 2])
def test_mmd_is_the_sum_over_pairs(n, m, unbiased, kernel, of, rows):
    x, y = features(n, 1), features(m, 2)
    a, b = x.double().numpy(), y.double().numpy()

    def within(z):
        pairs = [of(z[i], z[k]) for i in range(len(z)) for k in range(len(z)) if i != k or not unbiased]
        return np.mean(pairs)

    want = within(a) + within(b) - 2 * np.mean([of(u, v) for u in a for v in b])
    assert mmd(x, y, kernel, unbiased=unbiased, rows=rows) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_kid_is_torchmetrics_own():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = features(20, 3, d=32), features(20, 4, d=32)
    assert mmd(x, y, cubic, unbiased=True) == pytest.approx(float(kid.poly_mmd(x.double(), y.double())), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself():
    x = features(12, 5)
    assert mmd(x, x, gaussian, unbiased=False) == pytest.approx(0.0, abs=1e-15)
    assert mmd(features(400, 6), features(400, 6) + 1, gaussian, unbiased=True) > 0
