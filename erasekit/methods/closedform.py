"""Closed-form edits of the layers that read raw text embeddings.

Every edit here has the form Delta = W D S: `read` S (r, width) says how much of some directions a token holds, and
`difference` D (width, r) what is then added to it. D and S depend on embeddings only, so one solve serves all sites. A
layer's bias plays no part and stays as it is.

Where there are many embeddings, they enter as sums of products (width, width), so that memory grows with neither prompts
nor tokens. All functions are pure and compute in float64. Embeddings are rows: `w_ND` e_w, `u_ND` e_u, both raw.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from erasekit.erasures.deltas import LowRank

RidgeUnit = Literal["relative", "absolute"]  # of a ridge: times the mean of the system's diagonal, or as it is

RANK_ERROR = 1e-4  # what a lower rank may cost, see `cut`
_RANK_TOLERANCE = 1e-10  # relative to the largest singular value: below it two embeddings count as the same
_NEGLIGIBLE = 1e-5  # a ridge this small, relative to the mean of the diagonal, regularises nothing
_ROUNDING = 1e-12  # relative to an edit: less than this is rounding
_BLOCK = 64  # directions that `cut` looks for at a time

log = logging.getLogger("erasekit")


@dataclass(frozen=True, eq=False)
class Moment:
    """The sum of e e^T over embeddings that are kept.

    Attributes:
        total_DD: the sum, (width, width), float64.
        count: how many there are.
    """

    total_DD: torch.Tensor
    count: int

    @property
    def mean_DD(self) -> torch.Tensor:
        """The second moment, not centred: tr(Delta C Delta^T) is the mean of |Delta e|^2, the drift that an edit causes."""
        return self.total_DD / max(1, self.count)


@dataclass(eq=False)
class Pairs:
    """Sums over pairs of embeddings, e_w and what it should act like, e_u.

    Attributes:
        ww_DD: sum of e_w e_w^T, (width, width), float64.
        uu_DD: sum of e_u e_u^T.
        change_DD: sum of (e_u - e_w) e_w^T.
        count: how many pairs there are, each counting as its weight.
    """

    ww_DD: torch.Tensor
    uu_DD: torch.Tensor
    change_DD: torch.Tensor
    count: float = 0.0

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Pairs:
        """No pairs yet."""
        ww_DD, uu_DD, change_DD = torch.zeros(3, width, width, dtype=torch.float64, device=device)
        return cls(ww_DD, uu_DD, change_DD)

    def add(self, w_ND: torch.Tensor, u_ND: torch.Tensor, *, weight: float = 1.0) -> Pairs:
        """Count these pairs too, `weight` times each."""
        w_ND, u_ND = (side.to(self.ww_DD) for side in (w_ND, u_ND))
        add_products_(self.ww_DD, w_ND, weight=weight)
        add_products_(self.uu_DD, u_ND, weight=weight)
        self.change_DD.addmm_((u_ND - w_ND).T, w_ND, alpha=weight)
        self.count += weight * len(w_ND)
        return self

    def mapped(self, map_DD: torch.Tensor) -> Pairs:
        """The pairs (A e_w, e_u) for a matrix A."""
        read_DD = self.ww_DD @ map_DD.T  # sum of e_w (A e_w)^T
        change_DD = self.change_DD @ map_DD.T + read_DD - map_DD @ read_DD
        return Pairs(map_DD @ read_DD, self.uu_DD, change_DD, self.count)


def add_products_(total_DD: torch.Tensor, rows_ND: torch.Tensor, *, weight: float = 1.0, block: int = 512) -> None:
    """Add `weight` times the sum of e e^T over rows, in place; of the symmetric sum only one half is multiplied out."""
    for i in range(0, len(total_DD), block):
        part = weight * rows_ND[:, i : i + block].T @ rows_ND[:, i:]
        total_DD[i : i + block, i:] += part
        total_DD[i + block :, i : i + block] += part[:, block:].T


@dataclass(frozen=True, eq=False)
class TextEdit:
    """The edit Delta = W D S, for any number of layers W that read the same embeddings.

    Attributes:
        difference_DN: D, (width, r), float64.
        read_ND: S, (r, width), float64.
    """

    difference_DN: torch.Tensor
    read_ND: torch.Tensor

    def delta(self, weight: torch.Tensor) -> LowRank:
        """The delta of one layer: up = W D, down = S, in float64 on the edit's device. `weight` is (out, width)."""
        return LowRank(weight.detach().to(self.difference_DN) @ self.difference_DN, self.read_ND)


def layer_deltas(edits: Sequence[TextEdit], weight: torch.Tensor) -> list[LowRank]:
    """The deltas of one layer for several edits, e.g. the shares of many concepts.

    One product for all of them: a hundred narrow ones take several times as long.
    """
    differences_DN = torch.cat([edit.difference_DN for edit in edits], 1)
    ups = (weight.detach().to(differences_DN) @ differences_DN).split([len(edit.read_ND) for edit in edits], 1)
    return [LowRank(up, edit.read_ND) for up, edit in zip(ups, edits, strict=True)]


def eq1(w_ND: torch.Tensor, u_ND: torch.Tensor) -> list[TextEdit]:
    """TRACE, Eq. 1: W' = W + W (e_u - e_w) e_w^T / |e_w|^2, so that W' e_w = W e_u; of rank 1 for each concept.

    For several concepts the paper's sum of such terms loses that property wherever the e_w are not orthogonal
    (docs/explanation.md). Here S is the least-norm matrix with S e_wi = e_i (the i-th unit vector), the pseudo-inverse, so
    that it holds for each; where the e_w are linearly dependent, in least squares.

    Args:
        w_ND: e_w, one row for each concept.
        u_ND: its e_u.

    Returns:
        Each concept's share of the edit.
    """
    w_ND, u_ND = w_ND.double(), u_ND.double()
    return _rank_one((u_ND - w_ND).T, torch.linalg.pinv(w_ND.T, rtol=_RANK_TOLERANCE))


def delta_projection(w_ND: torch.Tensor, u_ND: torch.Tensor) -> list[TextEdit]:
    """TRACE, Prop. 3.2: W' = W (I - P), P the projection on delta = e_w - e_u, so that W' e_w = W' e_u.

    It is the least-norm edit with that property (others exist, docs/explanation.md); for several concepts P projects on
    the span of their differences. Arguments and value as of `eq1`.
    """
    delta_ND = w_ND.double() - u_ND.double()
    return _rank_one(-delta_ND.T, torch.linalg.pinv(delta_ND.T, rtol=_RANK_TOLERANCE))


def _rank_one(difference_DN: torch.Tensor, read_ND: torch.Tensor) -> list[TextEdit]:
    """The terms of D S, each an edit of its own."""
    return [TextEdit(difference_DN[:, [i]], read_ND[[i]]) for i in range(len(read_ND))]


def whitened(
    pairs: Sequence[Pairs],
    covariance_DD: torch.Tensor,
    *,
    ridge: float = 0.0,
    fix_neutral: bool = True,
    error: float = RANK_ERROR,
) -> list[TextEdit]:
    """The edit that moves other tokens least: min tr(Delta C Delta^T) subject to Delta K = R.

    K = [e_w, e_u] and R = [W (e_u - e_w), 0], so that W' e_w = W' e_u = W e_u; its solution is
    Delta = R (K^T C^-1 K)^-1 K^T C^-1, with a pseudo-inverse where columns of K are dependent (repeated pads). With a
    ridge r on the Gram matrix K^T C^-1 K that is R K^T (K K^T + r C)^-1, where only sums over columns of K are left.

    Args:
        pairs: of each concept.
        covariance_DD: C (see `Moment.mean_DD`); directions below 1e-8 of its mean eigenvalue count as that much.
        ridge: softens the constraints: added to the Gram matrix's diagonal, relative to its mean.
        fix_neutral: hold e_u; without it K = [e_w] only (ROME's form of Eq. 1).
        error: what a lower rank may cost (see `cut`).

    Returns:
        Each concept's share of the edit.
    """
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    root_DD = (vectors_DD * values_D.clamp_min(1e-8 * values_D.mean()).rsqrt()) @ vectors_DD.T  # C^-1/2
    gram_DD = root_DD @ sum((p.ww_DD + p.uu_DD if fix_neutral else p.ww_DD for p in pairs), 0 * root_DD) @ root_DD
    columns = sum(p.count for p in pairs) * (2 if fix_neutral else 1)
    root_DR = root_DD @ inverse_root(gram_DD, ridge=ridge * float(gram_DD.trace()) / columns)
    return [cut(p.change_DD, root_DR, error=error) for p in pairs]


def uce(
    pairs: Sequence[Pairs],
    kept_DD: torch.Tensor,
    *,
    lamb: float,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    unit: RidgeUnit = "relative",
    error: float = RANK_ERROR,
) -> list[TextEdit]:
    """Unified Concept Editing (WACV 2024), Eq. 7, as the delta W' - W = sum_e s_e W (e_u - e_w) e_w^T M^-1.

    M = C + ridge I and C = s_e sum e_w e_w^T + s_p sum e_p e_p^T over the erased and the preserved embeddings. The paper's
    lambda is the ridge itself (`unit` absolute); by default the ridge is lamb tr(C)/width, which means the same on every
    text encoder and for any number of embeddings. A ridge that is negligible beside tr(C)/width is logged as a warning;
    `lamb` 0 gives the least-norm solution.

    Args:
        pairs: of each concept.
        kept_DD: sum of e_p e_p^T (see `Moment.total_DD`).
        lamb: lambda.
        erase_scale: s_e.
        preserve_scale: s_p.
        unit: of lambda.
        error: what a lower rank may cost (see `cut`).

    Returns:
        Each concept's share of the edit.
    """
    c_DD = preserve_scale * kept_DD.double() + erase_scale * torch.stack([p.ww_DD for p in pairs]).sum(0)
    mean = float(c_DD.diagonal().mean())
    relative = lamb if unit == "relative" else lamb / mean
    if relative < _NEGLIGIBLE:
        log.warning("A ridge of %.1e of the mean of the system's diagonal is negligible: the edit may move anything.", relative)
    root_DR = inverse_root(c_DD, ridge=relative * mean)
    return [cut(erase_scale * p.change_DD, root_DR, error=error) for p in pairs]


def inverse_root(gram_DD: torch.Tensor, *, ridge: float) -> torch.Tensor:
    """F (width, r) with F F^T = (G + ridge I)^-1, G positive semidefinite; without a ridge F F^T is the pseudo-inverse."""
    if ridge > _RANK_TOLERANCE * float(gram_DD.diagonal().mean()):
        eye_DD = torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
        lower_DD = torch.linalg.cholesky(gram_DD + ridge * eye_DD)
        inverse_DD: torch.Tensor = torch.linalg.solve_triangular(lower_DD, eye_DD, upper=False)
        return inverse_DD.T
    values_D, vectors_DD = torch.linalg.eigh(gram_DD)
    # What is left of a direction that no embedding has is rounding, which grows with the width.
    kept = values_D > 10 * len(gram_DD) * torch.finfo(gram_DD.dtype).eps * values_D.max()
    root_DR: torch.Tensor = vectors_DD[:, kept] * values_D[kept].rsqrt()
    return root_DR


def ridge_solve(gram_DD: torch.Tensor, right_DN: torch.Tensor, *, ridge: float) -> torch.Tensor:
    """(G + ridge I)^-1 B for a positive semidefinite G, (width, n); without a ridge the least-norm solution G^+ B."""
    root_DR = inverse_root(gram_DD, ridge=ridge)
    return root_DR @ (root_DR.T @ right_DN)


def cut(change_DD: torch.Tensor, root_DR: torch.Tensor, *, error: float) -> TextEdit:
    """The edit E = X F F^T with the least rank whose error is at most `error`, relative, in root mean square.

    The mean is over what the edit was fitted to: with the system M = (F F^T)^-1 the sum of |E e|^2 over its embeddings, as
    they are weighted in it and its ridge included, is |E F^-T|^2 = |X F|^2. The best edit of a rank takes the largest
    singular vectors of X F on the left. They are looked for some at a time, by random combinations of what is still
    missing: most of 4,096 directions are never computed. D has orthonormal columns.

    Args:
        change_DD: X, (width, width).
        root_DR: F, (width, r).
        error: 0 leaves out rounding only.
    """
    whole_DR, generator = change_DD @ root_DR, torch.Generator().manual_seed(0)
    size, allowed = float(whole_DR.norm()), max(error, _ROUNDING)
    missing_DR, basis_DN = whole_DR, whole_DR[:, :0]
    while basis_DN.shape[1] < len(whole_DR) and float(missing_DR.norm()) > 0.1 * allowed * size:
        some = min(_BLOCK, len(whole_DR) - basis_DN.shape[1])
        mixed = torch.randn(whole_DR.shape[1], some, generator=generator, dtype=torch.float64).to(whole_DR)
        found_DN = missing_DR @ mixed
        for _ in range(2):  # once is not orthogonal to rounding
            found_DN = torch.linalg.qr(found_DN - basis_DN @ (basis_DN.T @ found_DN)).Q
        missing_DR = missing_DR - found_DN @ (found_DN.T @ missing_DR)
        basis_DN = torch.cat([basis_DN, found_DN], 1)
    left, values, _ = torch.linalg.svd(torch.linalg.qr(whole_DR.T @ basis_DN).R.T)
    dropped = values.square().flip(0).cumsum(0).flip(0) + missing_DR.square().sum()  # of the values from each one on
    rank = max(1, int((dropped.sqrt() > allowed * size).sum()))
    difference_DN = basis_DN @ left[:, :rank]
    return TextEdit(difference_DN, (difference_DN.T @ whole_DR) @ root_DR.T)
