"""The progress axis: tau in [0, 1], 0 is pure noise and 1 the finished image, on every backbone.

Nothing else in erasekit names a direction of time. Papers and published code disagree on it (for DDPM the timestep
falls while the image appears; a flow's sigma does too), so the two maps live here and are tested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch


@dataclass(frozen=True)
class Schedule:
    """The steps of one sampling run, from noise to image.

    Attributes:
        timesteps: what the denoiser is given at each step, (steps,), falling.
        tau: progress at each step, (steps,), rising.
    """

    timesteps: torch.Tensor
    tau: torch.Tensor

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.tau)

    def progress(self, share: float) -> float:
        """Progress after a share of the steps, e.g. 0.15 of 28: that of the first step with no smaller share before it.

        For DDPM timesteps it is the share itself. A flow's sampler shifts its steps towards noise, the more the larger the
        image: there the same share of the steps is over at less progress.
        """
        k = math.ceil(share * len(self) - 1e-6)
        return float(self.tau[k]) if k < len(self) else 1.0

    def first_late(self, tau0: float) -> int:
        """The index of the first late step (`len(self)` if there is none)."""
        return int((~is_late(self.tau, tau0)).sum())


@overload
def is_late(tau: float, tau0: float) -> bool: ...
@overload
def is_late(tau: torch.Tensor, tau0: float) -> torch.Tensor: ...
def is_late(tau: float | torch.Tensor, tau0: float) -> bool | torch.Tensor:
    """Whether progress is late, tau >= tau0: of one number, or elementwise. A step at tau0 is late, rounding or not."""
    return tau >= tau0 - 1e-6


def per_row(values_B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value for each row of `x` (b, ...), on its device and in a shape that multiplies it."""
    return values_B.to(x.device).view(-1, *[1] * (x.dim() - 1))


def ddpm_tau(timestep: torch.Tensor, train_steps: int = 1000) -> torch.Tensor:
    """Progress of DDPM timesteps: `train_steps - 1` is pure noise (0), timestep -1 would be the image (1)."""
    return 1 - (timestep.double() + 1) / train_steps


def ddpm_timestep(tau: torch.Tensor, train_steps: int = 1000) -> torch.Tensor:
    """The integer timestep nearest to `tau`, the inverse of `ddpm_tau`."""
    return ((1 - tau.double()) * train_steps - 1).round().clamp(0, train_steps - 1).long()


def flow_tau(sigma: torch.Tensor) -> torch.Tensor:
    """Progress of a rectified flow: sigma 1 is pure noise (0), sigma 0 the image (1)."""
    return 1 - sigma.double()


def flow_sigma(tau: torch.Tensor) -> torch.Tensor:
    """The inverse of `flow_tau`."""
    return 1 - tau.double()
