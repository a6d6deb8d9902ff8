"""The projection that keeps relaxed tokens a mixture."""

from __future__ import annotations

import torch


def project(rows_KV: torch.Tensor) -> torch.Tensor:
    """The nearest points of the probability simplex (Duchi et al. 2008, Figure 1), row by row."""
    sorted_KV = rows_KV.sort(dim=1, descending=True).values
    count_V = torch.arange(1, rows_KV.shape[1] + 1, device=rows_KV.device)
    excess_KV = (sorted_KV.cumsum(1) - 1) / count_V
    last_K = (sorted_KV > excess_KV).sum(1, keepdim=True) - 1
    return (rows_KV - excess_KV.gather(1, last_K)).clamp_min(0)
