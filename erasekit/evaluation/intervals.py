"""Harmonic means, and 95 % intervals of shares and of statistics of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Z95 = 1.959963984540054  # the 0.975 quantile of the normal distribution


def harmonic_mean(*values: float) -> float:
    """The harmonic mean of shares; 0 as soon as one of them is 0."""
    return len(values) / sum(1 / v for v in values) if min(values) > 0 else 0.0


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share of n images (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    centre = share + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap(
    groups: Sequence[np.ndarray], statistic: Callable[[Sequence[np.ndarray]], float], *, seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of several groups of images, each resampled on its own.

    Args:
        groups: one score per image, an array per group, none empty.
        statistic: takes the resampled groups.
        seed: of the resampling: equal scores give equal intervals.
        draws: how often to resample.
    """
    import numpy as np  # the other functions need none

    rng = np.random.default_rng(seed)
    values = [statistic([g[rng.integers(0, len(g), len(g))] for g in groups]) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
