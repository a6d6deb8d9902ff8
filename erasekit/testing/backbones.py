"""What every backbone owes: sampling that is its pipeline's, text that enters at its sites, and one direction of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from erasekit.backbones.protocol import Backbone, Capabilities, guided
from erasekit.backbones.sampler import follow
from erasekit.erasures.deltas import Dense, merged
from erasekit.errors import UsageError
from erasekit.evaluation.sampling import set_sampler
from erasekit.testing.worlds import Plugins, base_settings, check_fields, owe, owe_none, with_world

PROMPTS = ("a photo of a cat", "", "a dog")
STEPS = 3
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}  # of what two ways of computing the same may differ by


def check_backbone(
    name: str, *, settings: Mapping[str, Any] | None = None, size: int | None = None, plugin: Plugins = ()
) -> None:
    """See that a backbone keeps its contract, with the weights that its settings name.

    Args:
        name: the registered name.
        settings: of the backbone; of a model of a known family `{"path": tiny_folder("tiny")}` needs no download.
        size: of the images in pixels; the model's own, if left out. With the weights of a tiny model, 16 is quick.
        plugin: the file of a backbone that is not installed.

    Raises:
        AssertionError: something is broken; says what.
    """
    kind = with_world(plugin).backbones.get(name)
    what = f"'{name}'"
    check_fields(what, kind.Config)
    owe(isinstance(kind.capabilities, Capabilities), f"{what}: its capabilities are no Capabilities.")
    owe(kind.domain in ("natural", "mini"), f"{what}: its domain is '{kind.domain}'. It is 'natural' or 'mini'.")
    config = kind.Config(**base_settings(name) | dict(settings or {}))
    loaded = kind.load(config)
    members = {*Backbone.__annotations__, *(key for key in vars(Backbone) if not key.startswith("_"))}
    owe_none([key for key in sorted(members) if key not in dir(loaded)], f"{what} has no '{{}}', which every Backbone has.")
    with torch.no_grad():
        check_predictions_of_memory(what, kind, config)
        check_text(what, loaded)
        check_time(what, loaded, size)
        check_sites(what, loaded, size)
        check_sampling(what, loaded, size)
    check_gradients(what, loaded, size)


def check_predictions_of_memory(what: str, kind: Any, config: Any) -> None:
    """What is known before anything is loaded."""
    owe(kind.weights_gb(config) > 0, f"{what}: weights_gb is {kind.weights_gb(config)}.")
    owe(kind.needs(config, 512).denoiser > 0, f"{what}: needs() says that the denoiser takes no memory.")
    owe(kind.linears(config), f"{what}: linears() names no linear layer.")


def check_text(what: str, loaded: Backbone) -> None:
    """Prompts are encoded alike in any company, and wait on the CPU."""
    together, alone = loaded.encode(PROMPTS), [loaded.encode([prompt]) for prompt in PROMPTS]
    owe(together.tokens.device.type == "cpu", f"{what}: what `encode` gives lies on {together.tokens.device}, not on the CPU.")
    owe(len(loaded.encode([])) == 0, f"{what}: `encode([])` holds prompts.")
    for field, tensor in vars(together).items():
        same = tensor is None or all(torch.equal(tensor[[i]], getattr(one, field)) for i, one in enumerate(alone))
        owe(same, f"{what}: '{field}' of a prompt depends on the prompts that it is encoded with. Encode one at a time.")
    where = loaded.spans(PROMPTS[0], "cat")
    readings, begin = together.readings(), 0
    line = f"{what}: spans('{PROMPTS[0]}', 'cat') is {where}, not one range of token positions"
    owe(len(where) == len(readings), f"{line}{' for each reading' if len(readings) > 1 else ''}.")
    for span, read in zip(where, readings, strict=True):
        within = begin <= span.start and span.stop < begin + int(read.lengths[0])
        owe(within, f"{what}: spans() counts a phrase to the end token or the pads.")
        begin += read.ids.shape[1]
    owe(loaded.spans(PROMPTS[0], "dog") == [], f"{what}: spans() finds a phrase that does not stand in the prompt.")


def check_time(what: str, loaded: Backbone, size: int | None) -> None:
    """Progress is 0 at pure noise and 1 at the image."""
    tau = loaded.schedule(STEPS, size).tau
    owe(len(tau) == STEPS, f"{what}: a schedule of {STEPS} steps has {len(tau)}.")
    rising = bool((tau.diff() > 0).all()) and 0 <= float(tau[0]) < 1 / STEPS and float(tau[-1]) < 1
    owe(rising, f"{what}: the schedule's tau is {tau.tolist()}; it rises from 0, which is pure noise, and stays below 1.")
    x0, noise = loaded.latents([0, 1], size), loaded.latents([2, 3], size)
    owe(torch.equal(x0[[1]], loaded.latents([1], size)), f"{what}: the noise of a seed depends on the other seeds.")
    ends = torch.tensor([0.02, 0.98], dtype=torch.float64)
    x = loaded.add_noise(x0, noise, ends)
    for i, near, far in ((0, noise, x0), (1, x0, noise)):
        right = (x[i] - near[i]).square().mean() < (x[i] - far[i]).square().mean()
        owe(right, f"{what}: add_noise at tau {float(ends[i])} is nearer to the {('image', 'noise')[i]}. Turn tau round.")
    true = noise if loaded.capabilities.prediction == "epsilon" else noise - x0
    back = loaded.to_x0(true, x, ends)
    owe(torch.allclose(back, x0, rtol=1e-2, atol=1e-2), f"{what}: to_x0 does not undo add_noise for the true prediction.")


def check_sites(what: str, loaded: Backbone, size: int | None) -> None:
    """Text enters at the sites and nowhere else, and their weights are read without the denoiser."""
    sites = [site.name for site in loaded.text_sites()]
    layers = dict(loaded.denoiser.named_modules())
    owe_none([name for name in sites if name not in layers], f"{what}: the text site '{{}}' is no layer of the denoiser.")
    read = {name: loaded.weight(name).clone() for name in sites}
    other = [name for name in sites if not torch.equal(read[name].to(layers[name].weight), layers[name].weight)]
    owe_none(other, f"{what}: weight('{{}}') is not that layer's weight.")
    try:
        loaded.lora_targets("no such scope")
        owe(False, f"{what}: lora_targets() takes a scope that there is not. Raise a UsageError.")
    except UsageError:
        pass
    owe_none(
        [n for n in loaded.lora_targets("all") if n not in layers], f"{what}: scope 'all' names '{{}}', which is no layer."
    )
    x, tau = loaded.latents([0], size), torch.tensor([0.3], dtype=torch.float64)
    cat, dog = (loaded.encode([prompt]) for prompt in (PROMPTS[0], PROMPTS[2]))
    owe(not torch.equal(loaded.predict(x, tau, cat), loaded.predict(x, tau, dog)), f"{what}: predictions ignore the prompt.")
    base = loaded.fingerprint(sites)
    with merged(loaded.denoiser, {name: Dense(-weight) for name, weight in read.items()}):
        one, two = (loaded.predict(x, tau, cond) for cond in (cat, dog))
        owe(not loaded.unchanged(), f"{what}: unchanged() does not see that weights have changed.")
    owe(
        torch.allclose(one, two, **CLOSE),
        f"{what}: text enters elsewhere too: with the text sites at zero prompts still differ.",
    )
    owe(loaded.unchanged(), f"{what}: unchanged() is false of a denoiser that is as it was loaded.")
    owe(loaded.fingerprint(sites) == base, f"{what}: the fingerprint of the same layers is another one the second time.")


def check_sampling(what: str, loaded: Backbone, size: int | None) -> None:
    """Noise, encoded prompts, predictions and steps are those of the plain pipeline."""
    pipe, guidance = loaded.pipeline(), 2.0
    set_sampler(pipe, str(loaded.sampling.get("sampler", "ddim")))
    cond, empty = loaded.encode([PROMPTS[0]]), loaded.encode([""])

    def direction(x: torch.Tensor, tau: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return guided(loaded, x, tau, cond, uncond=empty, scale=guidance)

    mine = follow(loaded, [7], direction, steps=STEPS, size=size, batch=1, what="images")
    call = loaded.call_arguments(cond, empty=empty, guidance=guidance)
    image = loaded.decode(mine)
    owe(image.dim() == 4 and image.shape[:2] == (1, 3), f"{what}: decode gives {tuple(image.shape)}, not (b, 3, h, w).")
    side = {"height": image.shape[2], "width": image.shape[3]}
    generator = torch.Generator().manual_seed(7)
    seen: list[torch.Tensor] = []  # of FLUX.2 the pipeline puts out latents in the VAE's form, not in the denoiser's

    def record(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return tensors

    pipe(**call, **side, num_inference_steps=STEPS, generator=generator, output_type="latent", callback_on_step_end=record)
    theirs = seen[-1]
    owe(mine.shape == theirs.shape, f"{what}: latents are {tuple(mine.shape)}, the pipeline's {tuple(theirs.shape)}.")
    far = float((mine - theirs).abs().max())
    line = f"{what}: {STEPS} steps of its own end {far:.1e} away from the pipeline's latents of the same seed and prompt."
    owe(torch.allclose(mine, theirs, **CLOSE), f"{line} Compare latents, encode, schedule, predict and step with it.")
    own = {id(parameter) for parameter in loaded.denoiser.parameters()}
    shared = getattr(loaded.pipeline(encoders=False, shared=True), loaded.prefix)
    owe({id(p) for p in shared.parameters()} == own, f"{what}: pipeline(shared=True) has weights of its own.")
    fresh = getattr(pipe, loaded.prefix)
    owe(not own & {id(p) for p in fresh.parameters()}, f"{what}: pipeline() has the backbone's own weights, not a copy.")


def check_gradients(what: str, loaded: Backbone, size: int | None) -> None:
    """Methods train through `predict` and `decode`; the denoiser itself is frozen."""
    owe_none([n for n, p in loaded.denoiser.named_parameters() if p.requires_grad], f"{what}: '{{}}' is not frozen.")
    x = loaded.latents([0], size).requires_grad_()
    y = loaded.predict(x, torch.tensor([0.5], dtype=torch.float64), loaded.encode([PROMPTS[0]]))
    owe(y.shape == x.shape, f"{what}: predict gives {tuple(y.shape)} for latents {tuple(x.shape)}.")
    for name, value in (("predict", y), ("decode", loaded.decode(x))):
        (gradient,) = torch.autograd.grad(value.float().square().sum(), x)
        owe(bool(gradient.isfinite().all() and gradient.any()), f"{what}: no gradient goes through {name}.")
