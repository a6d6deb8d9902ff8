"""What every method owes on every backbone: a file that loads, a base that stays as it was, a concept that moves."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erasekit.backbones.protocol import Backbone
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into
from erasekit.methods.method import Method, MethodConfig
from erasekit.registration.plugins import Registries
from erasekit.runs.compute import compute
from erasekit.runs.config import build
from erasekit.runs.plan import Plan
from erasekit.runs.resolve import resolve
from erasekit.testing.worlds import (
    BACKBONES,
    SAVED,
    Plugins,
    base_settings,
    check_fields,
    check_settings,
    owe,
    owe_none,
    with_world,
)


def check_method(
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    plugin: Plugins = (),
    backbones: Sequence[str] = BACKBONES,
    concepts: Sequence[str] = ("cat", "dog"),
) -> None:
    """See that a method keeps its contract: on each backbone it erases twice, and its file is loaded and drawn with.

    Args:
        name: the registered name.
        settings: of the method, e.g. few steps, so that this takes seconds.
        plugin: the file of a method that is not installed.
        backbones: what it is tried on; those that lack what it `requires` are left out.
        concepts: what is erased together; the tiny world knows "cat" and "dog".

    Raises:
        AssertionError: something is broken; says what, on which backbone.
        ErasekitError: the method fails in a way that has a line of its own.
    """
    registries = with_world(plugin)
    method = registries.methods.get(name)
    check_class(name, method, registries)
    fitting = [b for b in backbones if method.requires <= registries.backbones.get(b).capabilities.names()]
    owe(fitting, f"'{name}' requires {', '.join(sorted(method.requires))}, which none of {', '.join(backbones)} has.")
    for backbone in fitting:
        check_on(backbone, name, settings or {}, tuple(concepts), registries)


def check_class(name: str, method: type[Method], registries: Registries) -> None:
    """See that the class says what it is: settings with descriptions, named sets that are valid, slots that exist."""
    owe(isinstance(method, type) and issubclass(method, Method), f"'{name}' is no subclass of erasekit.Method.")
    owe(issubclass(method.Config, MethodConfig), f"'{name}': Config is no subclass of erasekit.MethodConfig.")
    check_fields(f"'{name}'", method.Config)
    for kind in ("defaults", "presets", "ablations"):
        for key, values in getattr(method, kind).items():
            check_settings(f"'{name}', {kind}['{key}']", method.Config, values)
    for slot in method.slots:
        owe(slot in method.Config.model_fields, f"'{name}': the slot '{slot}' is no setting of its Config.")
        owe(registries.components.choices(slot), f"'{name}': nothing is registered for the slot '{slot}'.")


def check_on(backbone: str, name: str, settings: Mapping[str, Any], concepts: tuple[str, ...], registries: Registries) -> None:
    """Erase twice on one backbone, and look at the base, the file, and the images."""
    what = f"'{name}' on '{backbone}'"
    flags = {"method": name, "backbone": backbone, "task": "words" if backbone in SAVED else "", "concepts": concepts}
    options = {"method": dict(settings), "backbone": base_settings(backbone)}
    plan = resolve(build(flags | {"options": options}), registries)
    loaded, plain = (plan.backbone.load(plan.backbone_config) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        sha256 = compute(plan, loaded, registries).save(first)
        check_base(what, loaded, plain.denoiser.state_dict())
        other = plan if plan.seeded else replace(plan, config=plan.config.model_copy(update={"seed": 1}))
        again = compute(other, _tight(plan).load(plan.backbone_config), registries).save(second)
        line = f"{what}: the same settings and seed gave another file. Draw all that is random from ctx.generator(name)."
        if not plan.seeded:
            line = f"{what}: it says that its seed does not matter, and another one gave another file. Set seeded = True."
        owe(sha256 == again, line)
        erasure = Erasure.load(first, loaded)
        owe(erasure.method == name, f"{what}: the erasure is called '{erasure.method}'. Make it with self.erasure(...).")
        own = plan.method_config.model_dump(mode="json")
        owe(erasure.config == own, f"{what}: the erasure records {erasure.config} as its settings, given {own}.")
        check_images(what, loaded, first, plan, registries)


def _tight(plan: Plan) -> Any:
    """The backbone as a small GPU holds it: the text encoders are gone before the denoiser comes (see `Method.texts`)."""
    kind: Any = plan.backbone
    held = getattr(kind, "on_cpu", None)
    return kind if held is None else type(kind.__name__, (kind,), {"on_cpu": held._replace(encoders="released")})


def check_base(what: str, loaded: Backbone, before: Mapping[str, torch.Tensor]) -> None:
    """See that the base is what it was."""
    after = loaded.denoiser.state_dict()
    owe(before.keys() == after.keys(), f"{what}: it left adapters on the denoiser. Take them off (`with AdapterBank(...)`).")
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    owe_none(changed, f"{what}: it changed '{{}}' of the denoiser. Change weights inside of `merged` only.")
    on = [key for key, parameter in loaded.denoiser.named_parameters() if parameter.requires_grad]
    owe_none(on, f"{what}: it left gradients on, first of '{{}}'.")
    owe(not loaded.denoiser.training, f"{what}: it left the denoiser in training mode. Call denoiser.eval().")


def check_images(what: str, loaded: Backbone, folder: Path, plan: Plan, registries: Registries) -> None:
    """See that the file loads in a plain pipeline and changes the image of a prompt."""
    pipe = loaded.pipeline()
    load_into(pipe, folder, base=loaded, component=registries.components.get)
    prompts = [concept.prompts()[-1] for concept in plan.concepts]
    call = loaded.call_arguments(loaded.encode(prompts), empty=loaded.encode([""]), guidance=2.0)
    size = dict.fromkeys(("height", "width"), plan.protocol.size)

    def draw(pipe: Any) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(0) for _ in prompts]
        latents: torch.Tensor = pipe(**call, **size, num_inference_steps=2, generator=seeds, output_type="latent").images
        return latents

    for prompt, plain, erased in zip(prompts, draw(loaded.pipeline()), draw(pipe), strict=True):
        owe(bool(torch.isfinite(erased).all()), f"{what}: with the erasure, '{prompt}' draws numbers that are not finite.")
        same = torch.allclose(plain, erased, rtol=0, atol=1e-7)
        owe(not same, f"{what}: the erasure changes nothing of '{prompt}'.")
