"""Loading an erasure into a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file

from erasekit.backbones.protocol import Backbone
from erasekit.documents import Damaged, fault_of
from erasekit.erasures.deltas import check_layers
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.guidance import Guidance
from erasekit.erasures.manifest import MANIFEST, SETTINGS, file_stems
from erasekit.erasures.strength import Strength, factors
from erasekit.errors import ErasekitError, UsageError, unknown
from erasekit.quiet import quiet


def load_into(
    pipe: Any,
    folder: Path | str,
    concepts: Sequence[str] | None = None,
    *,
    strength: Strength | None = None,
    base: Backbone | None = None,
    component: Callable[[str, str], Any] | None = None,
) -> list[str]:
    """Load an erasure into a diffusers pipeline: with the pipeline's own `load_lora_weights`, or as a hook on its denoiser.

    What is loaded already stays as it is, and active: several erasures act together.

    Args:
        pipe: the pipeline of the erasure's base.
        folder: the erasure.
        concepts: load these, an adapter each; all of them as one adapter (`all`) if left out.
        strength: how strongly it acts, 0 to 1 and beyond; by name (`{"cat": 0.5}`), every concept is an adapter of its own.
        base: refuse an erasure of another one; says whether a pipeline of its kind is called with true guidance.
        component: looks up the scheme of an erasure that changes no weights; `erasekit.load` knows what is installed.

    Returns:
        The adapters' names, all active, for `pipe.set_adapters` (a name that is taken gets a number); none of an erasure that
        changes no weights, which `erasekit.erasures.hooks.detach` takes out again.

    Raises:
        UsageError: see `read_manifest`; or the erasure has no such concept, or the pipeline's projections are fused.
        EnvironmentProblem: a file is missing or damaged.
        ErasekitError: diffusers did not load every tensor.
    """
    folder = Path(folder)
    erasure = Erasure.load(folder, base)
    if erasure.guidance is not None:
        if concepts is not None:
            raise UsageError(f"'{folder}' steers away from all its concepts in one: it has no parts. Load it whole.")
        _load_guidance(pipe, folder, erasure.guidance, base, component, strength)
        return []
    stems = file_stems(list(erasure.deltas))
    for concept in concepts or ():
        if concept not in stems:
            raise unknown("concept of this erasure", concept, stems, f"{folder}/{MANIFEST}")
    factor = factors(strength, list(stems))
    if concepts is None and isinstance(strength, Mapping):
        concepts = list(stems)
    wanted = {"all": float(strength) if isinstance(strength, int | float) else 1.0}
    if concepts is not None:
        wanted = {stems[c]: factor[c] for c in concepts}
    denoiser: Any = getattr(pipe, erasure.prefix, None)
    if denoiser is None:
        raise UsageError(f"'{folder}' changes a {erasure.prefix}, which a {type(pipe).__name__} does not have.")
    if any(getattr(m, "fused_projections", False) for m in denoiser.modules()):
        raise UsageError(
            "The pipeline's projections are fused and would bypass the erasure: call unfuse_qkv_projections() first."
        )
    check_layers(denoiser, erasure.total())
    active = _active(denoiser)
    for file, weight in wanted.items():
        active[_load_file(pipe, denoiser, folder, erasure.prefix, file)] = weight
    names = list(active)[-len(wanted) :] if wanted else []
    if names:
        pipe.set_adapters(list(active), list(active.values()))
    return names


def _active(denoiser: Any) -> dict[str, float]:
    """The adapters of a denoiser that are active, and how strongly each acts."""
    if not getattr(denoiser, "peft_config", None):
        return {}
    from peft.tuners.lora import LoraLayer

    layers = [m for m in denoiser.modules() if isinstance(m, LoraLayer)]
    strengths = {}
    for name in denoiser.active_adapters():
        layer = next(m for m in layers if name in m.scaling)
        strengths[name] = layer.scaling[name] * layer.r[name] / layer.lora_alpha[name]
    return strengths


def unload(pipe: Any) -> None:
    """Take out of a pipeline what `load_into` put there; its weights are the base's again, and frozen."""
    from erasekit.erasures.hooks import denoiser_of, detach

    denoiser = denoiser_of(pipe)
    if getattr(denoiser, "peft_config", None):
        with quiet():
            pipe.unload_lora_weights()
    detach(pipe)
    denoiser.requires_grad_(False)


def _load_guidance(
    pipe: Any,
    folder: Path,
    guidance: Guidance,
    base: Backbone | None,
    component: Callable[[str, str], Any] | None,
    strength: Strength | None,
) -> None:
    """Attach the scheme of an erasure that changes no weights."""
    if component is None:
        raise UsageError(f"'{folder}' steers sampling by a registered scheme: use `erasekit.load`, or hand over a component.")
    if isinstance(strength, Mapping):
        raise UsageError(f"'{folder}' steers away from all its concepts in one: give one number as its strength.")
    try:
        built = component("guidance", guidance.scheme)
    except UsageError as error:
        line = f"'{folder}' steers sampling by the scheme '{guidance.scheme}', which no installed plugin has"
        raise UsageError(f"{line}. Install the plugin that made it, or give its file with --plugin.") from error
    try:
        scheme = built(guidance.settings)
    except (ValueError, TypeError, KeyError) as error:
        why = fault_of(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise Damaged(f"'{folder / SETTINGS}' is damaged: '{guidance.scheme}' does not take its settings ({why}).") from error
    from erasekit.erasures.hooks import attach

    embedded = base is None or base.embedded_guidance
    attach(pipe, guidance, scheme, embedded=embedded, strength=1.0 if strength is None else strength)


def _load_file(pipe: Any, denoiser: Any, folder: Path, prefix: str, stem: str) -> str:
    """Load one file as an adapter of its name, or the next that is free, and see that every tensor arrived; the name."""
    from peft.functional import get_peft_model_state_dict

    file, taken = f"{stem}.safetensors", getattr(denoiser, "peft_config", {})
    name = next(n for n in (stem, *(f"{stem}-{k}" for k in range(2, len(taken) + 3))) if n not in taken)
    with quiet():
        pipe.load_lora_weights(folder, weight_name=file, adapter_name=name)
    saved = {key.removeprefix(f"{prefix}.") for key in load_file(folder / file)}
    loaded = get_peft_model_state_dict(denoiser, adapter_name=name).keys() if name in denoiser.peft_config else set()
    if saved != loaded:
        raise ErasekitError(f"'{file}' holds {len(saved)} tensors, the pipeline loaded {len(saved & loaded)} of them.")
    return name
