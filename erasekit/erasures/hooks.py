"""The hooks that put a guidance erasure into the denoiser of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook

from erasekit.backbones.protocol import Conditioning
from erasekit.backbones.schedule import ddpm_tau, flow_tau
from erasekit.erasures.guidance import Guidance, Scheme, Step
from erasekit.errors import UsageError

_ModelHook: Any = ModelHook  # Any: diffusers is untyped
NAME = "erasekit"  # of the hook on a denoiser
READS: Mapping[str, str] = {"encoder_hidden_states": "tokens", "pooled_projections": "pooled"}  # what transformers are given
Prediction = Literal["none", "wanted", "concept"]


def attach(pipe: Any, guidance: Guidance, scheme: Scheme, *, embedded: bool = True, strength: float = 1.0) -> None:
    """Put a scheme into a pipeline, as a diffusers hook on its denoiser; one that is there is replaced.

    Args:
        pipe: a pipeline of Stable Diffusion, XL and 3.5 included, FLUX.1 or FLUX.2.
        guidance: its prompts and its scale.
        scheme: built with its settings.
        embedded: a FLUX pipeline is called without true classifier-free guidance, as usual.
        strength: how far predictions go from the base's (0) to the scheme's (1), and beyond.
    """
    detach(pipe)
    if strength == 0:
        return
    hook: Any
    if hasattr(pipe, "unet"):
        hook = UnetHook(guidance, scheme, pipe)
    elif "is_distilled" in pipe.config:  # FLUX.2 [klein] says of itself whether guidance is built in
        hook = FluxHook(guidance, scheme, embedded=pipe.config.is_distilled, pipe=pipe)
    elif hasattr(type(pipe), "do_classifier_free_guidance"):
        hook = JointHook(guidance, scheme, pipe)
    else:
        hook = FluxHook(guidance, scheme, embedded=embedded)
    hook.strength = strength
    HookRegistry.check_if_exists_or_initialize(denoiser_of(pipe)).register_hook(hook, NAME)


def detach(pipe: Any) -> None:
    """Take a scheme out of a pipeline, which then is the base's again."""
    HookRegistry.check_if_exists_or_initialize(denoiser_of(pipe)).remove_hook(NAME, recurse=False)


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a pipeline, a UNet or a transformer."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


class SteeringHook(_ModelHook):  # type: ignore[misc]
    """What the hooks of both kinds of denoisers share: the scheme, and knowing where an image begins."""

    def __init__(self, guidance: Guidance, scheme: Scheme) -> None:
        """Start before an image."""
        super().__init__()
        self.guidance, self.scheme = guidance, scheme
        self._memory: dict[str, torch.Tensor] = {}
        self._last = 1.0
        self.strength = 1.0

    def steer(self, tau: float, predict: Callable[..., tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The scheme's predictions; its memory is emptied where progress falls back: there the next image begins."""
        if tau <= self._last:
            self._memory = {}
        self._last = tau
        return self.scheme(Step(predict, tau, self._memory))

    def pair(self, tau: float, predict: Callable[..., tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """The scheme's two predictions, as far from the base's own as the strength says."""
        steered = self.steer(tau, predict)
        if self.strength == 1:
            return steered
        return tuple(torch.lerp(own, new, self.strength) for own, new in zip(predict("none", "wanted"), steered, strict=True))


def check_guided(pipe: Any) -> None:
    """See that a pipeline that can do without classifier-free guidance was called with it.

    Raises:
        UsageError: it was not.
    """
    if not getattr(pipe, "do_classifier_free_guidance", True):
        raise UsageError("This erasure steers classifier-free guidance, which is off. Sample with a guidance scale above 1.")


class RowsHook(SteeringHook):
    """On a denoiser that a pipeline calls once a step with the rows [unconditional, conditional]."""

    def __init__(self, guidance: Guidance, scheme: Scheme, pipe: Any) -> None:
        """The pipeline says how it calls."""
        super().__init__(guidance, scheme)
        self._pipe = pipe

    def concept(self, x: torch.Tensor) -> tuple[int, Conditioning]:
        """How many images there are, and as often the concept's prompt.

        Raises:
            UsageError: there is only one row for each image.
        """
        check_guided(self._pipe)
        n = len(x) // 2
        return n, self.guidance.prompts[[1]].repeat(n).to(x.device, x.dtype)


class UnetHook(RowsHook):
    """On a UNet."""

    def new_forward(self, module: Any, x: torch.Tensor, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        """The scheme's two predictions in the place of the denoiser's."""
        n, own = self.concept(x)
        given = {"none": encoder_hidden_states[:n], "wanted": encoder_hidden_states[n:], "concept": own.tokens}
        added = kwargs.pop("added_cond_kwargs", None) or {}  # SDXL's
        if added:
            summaries = added["text_embeds"]
            summary = {"none": summaries[:n], "wanted": summaries[n:], "concept": _summary(own, summaries.shape[-1])}

        def predict(*names: Prediction) -> tuple[torch.Tensor, ...]:
            embeddings, latents = torch.cat([given[name] for name in names]), torch.cat([x[:n]] * len(names))
            if added:
                sizes = torch.cat([added["time_ids"][:n]] * len(names))
                kwargs["added_cond_kwargs"] = {"text_embeds": torch.cat([summary[name] for name in names]), "time_ids": sizes}
            found = self.fn_ref.original_forward(latents, timestep, encoder_hidden_states=embeddings, **kwargs)
            return tuple(found[0].chunk(len(names)))

        tau = float(ddpm_tau(torch.as_tensor(timestep), self._pipe.scheduler.config.num_train_timesteps))
        return (torch.cat(self.pair(tau, predict)),)


def _summary(cond: Conditioning, width: int) -> torch.Tensor:
    """The summary of a prompt without the zeros that SDXL's backbone puts behind it."""
    assert cond.pooled is not None
    return cond.pooled[:, :width]


class JointHook(RowsHook):
    """On a transformer of Stable Diffusion 3."""

    def new_forward(self, module: Any, **kwargs: Any) -> Any:
        """The scheme's two predictions in the place of the denoiser's."""
        if kwargs.get("skip_layers") is not None:  # skip-layer guidance is drawn from the base's prediction
            return self.fn_ref.original_forward(**kwargs)
        x, timestep = kwargs["hidden_states"], kwargs["timestep"]
        n, own = self.concept(x)

        def predict(*names: Prediction) -> tuple[torch.Tensor, ...]:
            batch = {"hidden_states": torch.cat([x[:n]] * len(names)), "timestep": torch.cat([timestep[:n]] * len(names))}
            for key, attribute in READS.items():
                given = {"none": kwargs[key][:n], "wanted": kwargs[key][n:], "concept": getattr(own, attribute)}
                batch[key] = torch.cat([given[name] for name in names])
            return tuple(self.fn_ref.original_forward(**kwargs | batch)[0].chunk(len(names)))

        tau = float(flow_tau(timestep[0] / self._pipe.scheduler.config.num_train_timesteps))
        return (torch.cat(self.pair(tau, predict)),)


class FluxHook(SteeringHook):
    """On a FLUX transformer, which a pipeline calls once a step; with true guidance twice, the conditional one first."""

    def __init__(self, guidance: Guidance, scheme: Scheme, *, embedded: bool, pipe: Any = None) -> None:
        """`embedded`: the pipeline calls once a step; if not, `pipe` says whether it calls with guidance, if it knows."""
        super().__init__(guidance, scheme)
        self._embedded, self._pipe = embedded, pipe
        self._none: torch.Tensor | None = None

    def new_forward(self, module: Any, **kwargs: Any) -> Any:
        """The scheme's two predictions, combined here; with true guidance the pipeline asks for each and combines them."""
        x, tau = kwargs["hidden_states"], float(flow_tau(kwargs["timestep"][0]))
        if self._none is not None and tau == self._last:
            none, self._none = self._none, None
            return (none,)
        if not self._embedded:
            check_guided(self._pipe)
        own = self.guidance.prompts.to(x.device, x.dtype)
        given = {name: own[[row]].repeat(len(x)) for row, name in enumerate(("none", "concept"))}

        def predict(*names: Prediction) -> tuple[torch.Tensor, ...]:
            same = {key: kwargs[key] for key in ("hidden_states", "timestep", "guidance") if kwargs[key] is not None}
            batch = {key: torch.cat([value] * len(names)) for key, value in same.items()}
            for key, attribute in ((key, attribute) for key, attribute in READS.items() if key in kwargs):
                batch[key] = torch.cat([kwargs[key] if n == "wanted" else getattr(given[n], attribute) for n in names])
            return tuple(self.fn_ref.original_forward(**kwargs | batch)[0].chunk(len(names)))

        if self._embedded:
            none, conditional = self.steer(tau, predict)
            guided = none + self.guidance.scale * (conditional - none)
            return (guided if self.strength == 1 else torch.lerp(predict("wanted")[0], guided, self.strength),)
        none, conditional = self.pair(tau, predict)
        self._none = none
        return (conditional,)
