"""An erasure that acts only late in sampling, so that the early steps are the base's own (Cor. 3.4)."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from erasekit.backbones.schedule import ddpm_tau, flow_tau, is_late


class LateGate:
    """A diffusers `callback_on_step_end` that keeps a pipeline's adapters off while tau < tau0.

    The layers then run their base weights alone, so latents before tau0 equal the base's bit for bit. Load the erasure
    as adapters, do not merge it:

        gate = LateGate(pipe, tau0=0.15)
        pipe(prompt, callback_on_step_end=gate)

    The first step starts from noise and is early unless tau0 is 0. After a call the gate is set for the next one; `open`
    leaves the adapters on.
    """

    def __init__(self, pipe: Any, *, tau0: float) -> None:
        """Set the adapters of `pipe`, with a UNet or a transformer, for its first step."""
        self._denoiser: Any = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        self._tau0 = tau0
        self._set(is_late(0.0, tau0))

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Set the adapters for the step after `index`."""
        following = pipe.scheduler.timesteps[index + 1 :]
        tau = self._progress(pipe.scheduler, following[0]) if len(following) else 0.0
        self._set(is_late(tau, self._tau0))
        return tensors

    def open(self) -> None:
        """Turn the adapters on for good, for use without the gate."""
        self._set(True)

    @staticmethod
    def _progress(scheduler: Any, timestep: Any) -> float:
        steps = scheduler.config.num_train_timesteps
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        return float(flow_tau(timestep / steps) if flow else ddpm_tau(timestep, steps))

    def _set(self, late: bool) -> None:
        if late:
            self._denoiser.enable_adapters()
        else:
            self._denoiser.disable_adapters()
