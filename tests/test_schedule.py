"""The progress axis: which way it runs, for both families, against the formulas written out."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from erasekit.backbones.schedule import Schedule, ddpm_tau, ddpm_timestep, flow_sigma, flow_tau, is_late, per_row


def test_noise_is_0_and_the_image_is_1():
    """DDPM timesteps fall and sigmas fall while progress rises."""
    assert ddpm_tau(torch.tensor([999, 499, 0, -1])).tolist() == pytest.approx([0, 0.5, 0.999, 1])
    assert ddpm_tau(torch.tensor([99, 49]), 100).tolist() == pytest.approx([0, 0.5])
    assert flow_tau(torch.tensor([1.0, 0.25, 0.0])).tolist() == [0, 0.75, 1]
    assert flow_sigma(torch.tensor([0.0, 0.75, 1.0])).tolist() == [1, 0.25, 0]
    assert {f(torch.tensor([0.5])).dtype for f in (ddpm_tau, flow_tau, flow_sigma)} == {torch.float64}


def test_every_timestep_is_found_again():
    for steps in (1000, 7):
        every = torch.arange(steps)
        found = ddpm_timestep(ddpm_tau(every, steps), steps)
        assert torch.equal(found, every)
        assert found.dtype == torch.int64
        assert ddpm_timestep(torch.tensor([-0.5, 0.0, 1.0, 1.5]), steps).tolist() == [steps - 1, steps - 1, 0, 0]
    assert ddpm_timestep(torch.tensor([0.0, 0.9996, 1.0])).tolist() == [999, 0, 0]
    assert ddpm_timestep(torch.tensor([0.5004, 0.5006])).tolist() == [499, 498]  # the nearest


def test_a_step_at_tau0_is_late_whatever_the_rounding():
    tau = torch.tensor([0.3 - 1e-4, 0.3 - 1e-5, 0.1 + 0.2, 0.3, 0.31], dtype=torch.float32)
    assert is_late(tau, 0.3).tolist() == [False, False, True, True, True]
    assert is_late(0.3 - 1e-7, 0.3)
    assert not is_late(0.3 - 1e-5, 0.3)
    assert is_late(torch.tensor([0.3 - 1e-7], dtype=torch.float64), 0.3).tolist() == [True]


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_first_late_step_and_the_progress_of_a_share(steps):
    """Of evenly spaced steps a share is its own progress, to the next step."""
    schedule = Schedule(torch.arange(steps), torch.arange(steps, dtype=torch.float64) / steps)
    assert len(schedule) == steps
    for k in range(steps):
        assert schedule.first_late(k / steps) == k
        assert schedule.progress(k / steps) == pytest.approx(k / steps)
        assert schedule.progress((k + 0.5) / steps) == pytest.approx((k + 1) / steps)
        assert schedule.progress(k / steps + 1e-9) == pytest.approx(k / steps)
        assert schedule.progress(k / steps + 1e-4) == pytest.approx((k + 1) / steps)
    assert schedule.first_late(1.0) == steps
    assert schedule.progress(1.0) == 1.0
    assert isinstance(schedule.progress(0.5), float)
    assert isinstance(schedule.first_late(0.5), int)


def test_a_share_of_a_flows_steps_is_their_own_progress():
    sigma = torch.linspace(1, 0, 29, dtype=torch.float64)[:-1]
    shifted = 3 * sigma / (1 + 2 * sigma)
    schedule = Schedule(torch.arange(28), flow_tau(shifted))
    k = math.ceil(0.15 * 28)
    assert schedule.progress(0.15) == 1 - float(shifted[k])
    assert schedule.first_late(schedule.progress(0.15)) == k


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4, 4)])
def test_one_value_for_each_row(shape):
    x = torch.ones(shape)
    scaled = per_row(torch.tensor([2.0, 5.0]), x) * x
    assert scaled.shape == x.shape
    assert (scaled[0] == 2).all()
    assert (scaled[1] == 5).all()


def test_a_schedule_stays_what_it_is():
    with pytest.raises(FrozenInstanceError):
        Schedule(torch.arange(2), torch.arange(2)).tau = None
