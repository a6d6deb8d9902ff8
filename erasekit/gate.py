"""An erasure that acts only late in sampling, so that the early steps are the base's own (Cor. 3.4)."""

from __future__ import annotations

from typing import Any

from erasekit.schedule import Schedule, ddpm_tau


class LateGate:
    """A diffusers `callback_on_step_end` that keeps a pipeline's adapters off while tau < tau0.

    The layers then run their base weights alone, so latents before tau0 equal the base's bit for bit. Load the erasure
    as adapters, do not merge it:

        gate = LateGate(pipe, tau0=0.15, steps=30)
        pipe(prompt, num_inference_steps=30, callback_on_step_end=gate)

    After a call the gate is set for the next one; `open` leaves the adapters on.
    """

    def __init__(self, pipe: Any, *, tau0: float, steps: int) -> None:
        """Set the adapters of `pipe` for its first step; `steps` is the `num_inference_steps` of the calls to come."""
        self._denoiser: Any = pipe.unet
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps
        tau = ddpm_tau(timesteps, scheduler.config.num_train_timesteps)
        first = Schedule(timesteps=timesteps, tau=tau).first_late(tau0)
        self._late = [k >= first for k in range(len(timesteps))]
        self._timesteps: list[float] = timesteps.tolist()
        self._set(self._late[0])

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Set the adapters for the step after `index`.

        Raises:
            ValueError: the pipeline runs other steps than the gate was made for.
        """
        if index >= len(self._late) or float(timestep) != self._timesteps[index]:
            raise ValueError(
                f"The gate was made for {len(self._late)} steps of this scheduler, step {index} is not one of them."
            )
        self._set(self._late[(index + 1) % len(self._late)])
        return tensors

    def open(self) -> None:
        """Turn the adapters on for good, for use without the gate."""
        self._set(True)

    def _set(self, late: bool) -> None:
        if late:
            self._denoiser.enable_adapters()
        else:
            self._denoiser.disable_adapters()
