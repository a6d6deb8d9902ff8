"""SPEED's parts as pure functions, in float64 (ICLR 2026, section 4). Embeddings are rows; W is (out, width)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from erasekit.erasures.deltas import LowRank, compress
from erasekit.methods.closedform import Pairs, TextEdit


def unconstrained(change_DD: torch.Tensor, target_DD: torch.Tensor) -> torch.Tensor:
    """The edit that erases and holds nothing, as E of Delta = W E: sum (e_u - e_w) e_w^T (I + sum e_w e_w^T)^-1."""
    eye_DD = torch.eye(len(target_DD), dtype=target_DD.dtype, device=target_DD.device)
    edit_DD: torch.Tensor = torch.linalg.solve(eye_DD + target_DD, change_DD.T).T
    return edit_DD


def affected(rows_ND: torch.Tensor, edit_OD: torch.Tensor) -> torch.Tensor:
    """Influence-based prior filtering: the embeddings that an edit moves more than it moves them on average, |Delta e|."""
    moved_N = (rows_ND @ edit_OD.T).norm(dim=1)
    return rows_ND[moved_N > moved_N.mean()] if len(rows_ND) > 1 else rows_ND


def augmented(
    rows_ND: torch.Tensor, weight_OD: torch.Tensor, edit_OD: torch.Tensor, copies: int, generator: torch.Generator
) -> torch.Tensor:
    """Directed prior augmentation: the rows, and copies of them with noise that the layer hardly reads.

    The noise is along the right singular vector of W with the smallest singular value; of the copies those stay that the
    edit moves more than on average.
    """
    if not copies:
        return rows_ND
    least_D = torch.linalg.svd(weight_OD, full_matrices=False).Vh[-1]
    noise_ND = torch.randn(copies * len(rows_ND), rows_ND.shape[1], generator=generator, dtype=torch.float64).to(rows_ND)
    copies_ND = rows_ND.repeat(copies, 1) + (noise_ND @ least_D)[:, None] * least_D
    return torch.cat([rows_ND, affected(copies_ND, edit_OD)])


def null_projector(moment_DD: torch.Tensor, threshold: float) -> torch.Tensor:
    """P, onto the directions in which the second moment of what must stay has an eigenvalue below the threshold."""
    values_D, vectors_DD = torch.linalg.eigh(moment_DD)
    least_DR = vectors_DD[:, values_D < threshold]
    projector_DD: torch.Tensor = least_DR @ least_DR.T
    return projector_DD


def invariants(rows_ND: torch.Tensor, centres: int, rounds: int = 20) -> torch.Tensor:
    """K2 (width, k): the first token of the empty prompt, and the centres of its other ones by k-means.

    The first centres are the tokens that lie furthest from those chosen before, so nothing is random.
    """
    first_1D, rest_MD = rows_ND[:1], rows_ND[1:]
    if not len(rest_MD):
        return first_1D.T
    chosen_KD = rest_MD[:1]
    while len(chosen_KD) < min(centres, len(rest_MD)):
        far = torch.cdist(rest_MD, chosen_KD).amin(1).argmax()
        chosen_KD = torch.cat([chosen_KD, rest_MD[far][None]])
    for _ in range(rounds):
        nearest_M = torch.cdist(rest_MD, chosen_KD).argmin(1)
        means = [rest_MD[nearest_M == k] for k in range(len(chosen_KD))]
        chosen_KD = torch.stack([m.mean(0) if len(m) else chosen_KD[k] for k, m in enumerate(means)])
    return torch.cat([first_1D, chosen_KD]).T


def speed(
    pairs: Sequence[Pairs],
    null_DD: torch.Tensor,
    held_DK: torch.Tensor,
    *,
    scale: float,
    lamb: float = 0.0,
) -> list[TextEdit]:
    """Each concept's share of the edit Delta = W X P (I - M K2 (K2^T P M K2 + lambda I)^-1 K2^T P) M, M = (T P + r I)^-1.

    X is the mean over concepts of sum (e_u - e_w) e_w^T and T that of sum e_w e_w^T. Delta is zero on every embedding that
    P maps to zero, and with lambda 0 on every invariant.

    Args:
        pairs: of each concept.
        null_DD: P.
        held_DK: K2.
        scale: r, how strongly the weights are held.
        lamb: lambda, how far invariants may move.
    """
    n = len(pairs)
    target_DD = torch.stack([p.ww_DD for p in pairs]).sum(0) / n
    eye_DD = torch.eye(len(target_DD), dtype=target_DD.dtype, device=target_DD.device)
    m_DD = torch.linalg.inv(target_DD @ null_DD + scale * eye_DD)
    gram_KK = held_DK.T @ null_DD @ m_DD @ held_DK
    soft_KK = gram_KK + lamb * torch.eye(len(gram_KK), dtype=gram_KK.dtype, device=gram_KK.device)
    fix_DD = m_DD @ held_DK @ torch.linalg.pinv(soft_KK, rtol=1e-10) @ held_DK.T @ null_DD
    reach_DD = null_DD @ (eye_DD - fix_DD) @ m_DD
    shares = [compress(LowRank(p.change_DD / n, reach_DD)) for p in pairs]
    return [TextEdit(share.up, share.down) for share in shares]
