"""Closed-form edits of the layers that read raw text embeddings.

Every edit here has the form Delta = W D S: `read` S (n, width) says how much of each erased embedding a token holds, and
`difference` D (width, n) what is then added to it. D and S depend on embeddings only, so one solve serves all sites, and
the rank is at most the number of erased embeddings. A layer's bias plays no part and stays as it is.

All functions are pure and compute in float64. Embeddings are rows: `concept_ND` e_w, `neutral_ND` e_u, both raw.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from erasekit.deltas import LowRank

RidgeUnit = Literal["relative", "absolute"]  # of a ridge: times the mean of the system's diagonal, or as it is

_RANK_TOLERANCE = 1e-10  # relative to the largest singular value: below it two embeddings count as the same
_NEGLIGIBLE = 1e-5  # a ridge this small, relative to the mean of the diagonal, regularises nothing

log = logging.getLogger("erasekit")


@dataclass(frozen=True, eq=False)
class TextEdit:
    """The edit Delta = W D S, for any number of layers W that read the same embeddings.

    Attributes:
        difference_DN: D, (width, n), float64.
        read_ND: S, (n, width), float64.
    """

    difference_DN: torch.Tensor
    read_ND: torch.Tensor

    def delta(self, weight: torch.Tensor) -> LowRank:
        """The delta of one layer: up = W D, down = S, in float64 on the edit's device. `weight` is (out, width)."""
        return LowRank(weight.detach().to(self.difference_DN) @ self.difference_DN, self.read_ND)

    def damped(self, eta: float) -> TextEdit:
        """The edit times `eta`: 1 is all of it, 0 none."""
        return TextEdit(self.difference_DN * eta, self.read_ND)

    def columns(self, index: slice | Sequence[int]) -> TextEdit:
        """The share of some of the erased embeddings in a joint solve; the shares of all of them sum to the edit."""
        return TextEdit(self.difference_DN[:, index], self.read_ND[index])

    def split(self, sizes: Sequence[int]) -> list[TextEdit]:
        """The shares of consecutive groups of erased embeddings, e.g. one group per concept.

        Raises:
            ValueError: the sizes do not sum to the number of embeddings.
        """
        if sum(sizes) != len(self.read_ND):
            raise ValueError(f"Groups of {list(sizes)} do not make up {len(self.read_ND)} embeddings.")
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        return [self.columns(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]

    def compressed(self, tolerance: float = 1e-12) -> TextEdit:
        """The same edit with the least rank, so never more than the width; the rows of `read` become orthonormal.

        Singular values of D S below `tolerance` times the largest one are dropped. Orthonormal rows also keep the edit
        exact when it is cast to float32: what is dropped or rounded is relative to the edit, not to its factors.
        """
        if len(self.read_ND) > self.read_ND.shape[1]:  # more embeddings than dimensions: D S is smaller than its factors
            left_DR, s_R, right_RW = torch.linalg.svd(self.difference_DN @ self.read_ND)
        else:
            q_DN, r_left = torch.linalg.qr(self.difference_DN)
            q_WN, r_right = torch.linalg.qr(self.read_ND.T)
            u, s_R, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
            left_DR, right_RW = q_DN @ u, vh @ q_WN.T
        rank = max(1, int((s_R > tolerance * s_R[0]).sum()))
        return TextEdit(left_DR[:, :rank] * s_R[:rank], right_RW[:rank])


def layer_deltas(edits: Sequence[TextEdit], weight: torch.Tensor) -> list[LowRank]:
    """The deltas of one layer for several edits, e.g. the shares of many concepts.

    One product for all of them: a hundred narrow ones take several times as long.
    """
    differences_DN = torch.cat([edit.difference_DN for edit in edits], 1)
    ups = (weight.detach().to(differences_DN) @ differences_DN).split([len(edit.read_ND) for edit in edits], 1)
    return [LowRank(up, edit.read_ND) for up, edit in zip(ups, edits, strict=True)]


def covariance(embeddings_ND: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The second moment C = mean of c c^T, (width, width), float64, `weights` (n,) counting some rows more.

    It is not centred: tr(Delta C Delta^T) is then the mean of |Delta c|^2, the drift that an edit causes.
    """
    c_ND = embeddings_ND.double()
    w_N = torch.ones(len(c_ND), dtype=torch.float64, device=c_ND.device) if weights is None else weights.double()
    return (c_ND * (w_N / w_N.sum())[:, None]).T @ c_ND


def eq1(concept_ND: torch.Tensor, neutral_ND: torch.Tensor) -> TextEdit:
    """TRACE, Eq. 1: W' = W + W (e_u - e_w) e_w^T / |e_w|^2, so that W' e_w = W e_u.

    For several embeddings S is the least-norm matrix with S e_wi = e_i (the i-th unit vector), the pseudo-inverse; for
    one it is e_w^T / |e_w|^2. Where e_w are linearly dependent, least squares.
    """
    w_ND, u_ND = concept_ND.double(), neutral_ND.double()
    return TextEdit((u_ND - w_ND).T, torch.linalg.pinv(w_ND.T, rtol=_RANK_TOLERANCE))


def delta_projection(concept_ND: torch.Tensor, neutral_ND: torch.Tensor) -> TextEdit:
    """TRACE, Prop. 3.2: W' = W (I - P), P the projection on delta = e_w - e_u, so that W' e_w = W' e_u.

    It is the least-norm edit with that property (others exist, METHODS section 6); for several embeddings P projects
    on the span of their differences.
    """
    delta_ND = concept_ND.double() - neutral_ND.double()
    return TextEdit(-delta_ND.T, torch.linalg.pinv(delta_ND.T, rtol=_RANK_TOLERANCE))


def whitened(
    concept_ND: torch.Tensor,
    neutral_ND: torch.Tensor,
    covariance_DD: torch.Tensor,
    *,
    ridge: float = 0.0,
    fix_neutral: bool = True,
) -> TextEdit:
    """The edit that moves other tokens least: min tr(Delta C Delta^T) subject to Delta K = R.

    K = [e_w, e_u] and R = [W (e_u - e_w), 0], so that W' e_w = W' e_u = W e_u; its solution is
    Delta = R (K^T C^-1 K)^-1 K^T C^-1, with a pseudo-inverse where columns of K are dependent (repeated pads).

    Args:
        concept_ND: e_w, (n, width).
        neutral_ND: e_u, (n, width).
        covariance_DD: C (see `covariance`); directions below 1e-8 of its mean eigenvalue count as that much.
        ridge: softens the constraints: added to the Gram matrix's diagonal, relative to its mean.
        fix_neutral: hold e_u; without it K = [e_w] only (ROME's form of Eq. 1).
    """
    w_ND, u_ND = concept_ND.double(), neutral_ND.double()
    k_DM = (torch.cat([w_ND, u_ND]) if fix_neutral else w_ND).T
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    root_DD = (vectors_DD * values_D.clamp_min(1e-8 * values_D.mean()).rsqrt()) @ vectors_DD.T  # C^-1/2
    u, s_M, vh = torch.linalg.svd(root_DD @ k_DM, full_matrices=False)
    softening = ridge * s_M.square().sum() / k_DM.shape[1]
    kept = s_M > _RANK_TOLERANCE * s_M[0]
    filter_M = torch.where(kept, s_M / (s_M.square() + softening), 0.0)
    read_MD = (vh.T * filter_M) @ u.T @ root_DD
    return TextEdit((u_ND - w_ND).T, read_MD[: len(w_ND)])


def uce(
    concept_ND: torch.Tensor,
    neutral_ND: torch.Tensor,
    preserve_MD: torch.Tensor,
    *,
    lamb: float,
    erase_scale: float,
    preserve_scale: float,
    unit: RidgeUnit = "relative",
) -> TextEdit:
    """Unified Concept Editing (WACV 2024), Eq. 7, as the delta W' - W = sum_e s_e W (e_u - e_w) e_w^T M^-1.

    M = C + ridge I and C = s_e sum e_w e_w^T + s_p sum e_p e_p^T over the erased and the preserved embeddings. The paper's
    lambda is the ridge itself (`unit` absolute); by default the ridge is lamb tr(C)/width, which means the same on every
    text encoder and for any number of embeddings. A ridge that is negligible beside tr(C)/width is logged as a warning;
    `lamb` 0 gives the least-norm solution. `preserve_MD` may have no rows.
    """
    w_ND, u_ND, p_MD = concept_ND.double(), neutral_ND.double(), preserve_MD.double()
    c_DD = erase_scale * w_ND.T @ w_ND + preserve_scale * p_MD.T @ p_MD
    mean = c_DD.diagonal().mean()
    relative = lamb if unit == "relative" else lamb / float(mean)
    if relative < _NEGLIGIBLE:
        log.warning("A ridge of %.1e of the mean of the system's diagonal is negligible: the edit may move anything.", relative)
    return TextEdit((u_ND - w_ND).T, erase_scale * ridge_solve(c_DD, w_ND.T, ridge=relative * float(mean)).T)


def ridge_solve(gram_DD: torch.Tensor, right_DN: torch.Tensor, *, ridge: float) -> torch.Tensor:
    """(G + ridge I)^-1 B for a positive semidefinite G, (width, n); without a ridge the least-norm solution G^+ B."""
    width, mean = len(gram_DD), float(gram_DD.diagonal().mean())
    if ridge > _RANK_TOLERANCE * mean:
        shifted_DD = gram_DD + ridge * torch.eye(width, dtype=gram_DD.dtype, device=gram_DD.device)
        solved: torch.Tensor = torch.cholesky_solve(right_DN, torch.linalg.cholesky(shifted_DD))
        return solved
    # What is left of a direction that no embedding has is rounding, which grows with the width.
    tolerance = 10 * width * torch.finfo(gram_DD.dtype).eps
    inverse_DD: torch.Tensor = torch.linalg.pinv(gram_DD, hermitian=True, rtol=tolerance)
    return inverse_DD @ right_DN
