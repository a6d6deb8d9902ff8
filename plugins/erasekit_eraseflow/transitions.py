"""Random steps of a sampler, and how likely they are: one set of formulas for both families.

Latents at a step are x = a x0 + s noise; the next step has the rates a' and s'. DDPM and rectified flows differ in these
rates alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from erasekit.backbones.protocol import Backbone
from erasekit.backbones.schedule import Schedule


class Rates(NamedTuple):
    """The rates of a step and of the next one."""

    signal: float
    noise: float
    next_signal: float
    next_noise: float

    @property
    def kept(self) -> float:
        """What the noising x | x' keeps of x': r = a / a'."""
        return self.signal / self.next_signal

    @property
    def added(self) -> float:
        """The standard deviation of the noising x | x': sqrt(s^2 - r^2 s'^2)."""
        return math.sqrt(self.noise**2 - (self.kept * self.next_noise) ** 2)

    def drawn(self, eta: float) -> float:
        """The standard deviation of the step x' | x: at an eta of 1 that of the noising's reverse (DDIM, Eq. 16)."""
        return eta * self.next_noise * self.added / self.noise


def rates_of(backbone: Backbone, schedule: Schedule) -> list[Rates]:
    """Of all steps after which there is noise left: on a flow all but the last, whose density is no number."""
    tau = torch.cat([schedule.tau.double(), torch.ones(1, dtype=torch.float64)])
    one, zero = (torch.full((len(tau), 1, 1, 1), value, dtype=torch.float64) for value in (1.0, 0.0))
    signal = backbone.add_noise(one, zero, tau).flatten().tolist()
    noise = backbone.add_noise(zero, one, tau).flatten().tolist()
    found = [Rates(signal[k], noise[k], signal[k + 1], noise[k + 1]) for k in range(len(schedule))]
    return [rates for rates in found if rates.next_noise > 0]


def mean_of(
    backbone: Backbone, prediction: torch.Tensor, x: torch.Tensor, tau: torch.Tensor, rates: Rates, eta: float
) -> torch.Tensor:
    """The mean of the step x' | x (DDIM, Eq. 12), a' x0 + sqrt(s'^2 - sigma^2) noise, both as predicted."""
    x0 = backbone.to_x0(prediction.float(), x.float(), tau)
    noise = (x.float() - rates.signal * x0) / rates.noise
    rest = math.sqrt(rates.next_noise**2 - rates.drawn(eta) ** 2)
    return rates.next_signal * x0 + rest * noise


def log_density(x: torch.Tensor, mean: torch.Tensor, deviation: float) -> torch.Tensor:
    """Of a Gaussian, the mean over its dimensions: (b,) for x and mean (b, ...)."""
    each = -((x - mean) ** 2) / (2 * deviation**2) - math.log(deviation) - 0.5 * math.log(2 * math.pi)
    return each.flatten(1).mean(1)
