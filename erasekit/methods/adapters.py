"""LoRA adapters on a denoiser while a method trains: one per concept, one trainable, all off for the teacher."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch

from erasekit.backbones.protocol import Backbone
from erasekit.erasures.deltas import Deltas, Dense, LowRank
from erasekit.errors import UsageError
from erasekit.quiet import quiet

Init = Literal["uniform", "gaussian"]


class AdapterBank:
    """Named LoRA adapters on a backbone's denoiser.

    Unless it is told otherwise an adapter has alpha == rank, so that a module's delta is `B @ A` as it stands. Names are
    free text: inside of the denoiser the adapters are called `bank_0`, `bank_1`, ... As a context it takes them all off at
    its end.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Start without adapters on `backbone.denoiser`, whose own weights are frozen from here on."""
        self._denoiser: Any = backbone.denoiser  # Any: diffusers' adapter methods are untyped
        self._keys: dict[str, str] = {}  # name -> the adapter's name inside of the denoiser
        self._parameters: dict[str, dict[str, torch.nn.Parameter]] = {}  # name -> module.lora_A.weight -> parameter
        self._scales: dict[str, float] = {}  # name -> alpha / rank
        self._trainable = ""
        self._active: list[str] = []  # of the adapters' names inside of the denoiser
        self._off = False
        self._denoiser.requires_grad_(False)

    def __enter__(self) -> Self:
        """The bank itself."""
        return self

    def __exit__(self, *problem: object) -> None:
        """Take all adapters off."""
        self.remove()

    @property
    def names(self) -> list[str]:
        """The adapters in the order in which they were added."""
        return list(self._keys)

    def add(
        self,
        name: str,
        targets: Sequence[str],
        rank: int,
        generator: torch.Generator,
        *,
        init: Init = "uniform",
        alpha: float | None = None,
    ) -> None:
        """Add a trainable adapter that changes nothing yet: B is zero, A from `generator`.

        Its weights are float32 whatever the denoiser's type. It stays frozen until `train_only`.

        Args:
            name: what it is called.
            targets: paths of linear layers.
            rank: in each of them.
            generator: draws A.
            init: A is uniform in +-1/sqrt(in), or gaussian with a standard deviation of 1/rank.
            alpha: a module's delta is alpha/rank B A; left out, alpha is the rank.

        Raises:
            UsageError: the name is taken, or a target is missing.
        """
        self._inject(name, dict.fromkeys(targets, rank), scale=1.0 if alpha is None else alpha / rank)
        with torch.no_grad():
            for key, parameter in self._parameters[name].items():
                if ".lora_A." in key:
                    drawn, bound = torch.empty(parameter.shape), 1 / math.sqrt(parameter.shape[1])
                    if init == "gaussian":
                        drawn.normal_(std=1 / rank, generator=generator)
                    else:
                        drawn.uniform_(-bound, bound, generator=generator)
                    parameter.copy_(drawn)

    def add_frozen(self, name: str, deltas: Deltas) -> None:
        """Add low-rank deltas (a closed-form part, say) as an adapter; ranks may differ from module to module.

        Raises:
            UsageError: the name is taken, a module is missing, or a delta is dense.
        """
        dense = [module for module, delta in deltas.items() if isinstance(delta, Dense)]
        if dense:
            raise UsageError(f"The delta of '{dense[0]}' in '{name}' is dense; an adapter needs low-rank ones (compress it).")
        low = {module: delta for module, delta in deltas.items() if isinstance(delta, LowRank)}
        self._inject(name, {module: delta.rank for module, delta in low.items()})
        with torch.no_grad():
            for module, delta in low.items():
                self._parameters[name][f"{module}.lora_A.weight"].copy_(delta.down)
                self._parameters[name][f"{module}.lora_B.weight"].copy_(delta.up)

    def train_only(self, name: str, *, alone: bool = False) -> list[torch.nn.Parameter]:
        """Make one adapter the trainable one; its parameters in a fixed order (sorted by key).

        Args:
            name: which one.
            alone: no other is active until the next call.

        Raises:
            UsageError: there is no such adapter.
        """
        if name not in self._keys:
            raise UsageError(f"There is no adapter '{name}'; there are {', '.join(self._keys) or 'none'}.")
        self._trainable = name
        self._activate([name] if alone else self.names)
        return [self._parameters[name][key] for key in sorted(self._parameters[name])]

    def _activate(self, names: Sequence[str]) -> None:
        keys = [self._keys[name] for name in names]
        if keys != self._active:
            self._denoiser.set_adapter(keys)
            self._active = keys
        self._freeze()

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """All adapters off: predictions are the base's, bit for bit. What is trainable is the same afterwards."""
        if self._off or not self._keys:  # already off in an outer teacher()
            yield
            return
        self._denoiser.disable_adapters()
        self._off = True
        try:
            yield
        finally:
            self._off = False
            self._denoiser.enable_adapters()  # makes every adapter trainable
            self._freeze()

    def deltas(self, name: str) -> Deltas:
        """A copy of an adapter's deltas on the CPU, in float32."""
        tensors = {key: p.detach().float().cpu().clone() for key, p in self._parameters[name].items()}
        modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
        scale = self._scales[name]
        return {m: LowRank(scale * tensors[f"{m}.lora_B.weight"], tensors[f"{m}.lora_A.weight"]) for m in modules}

    def remove(self) -> None:
        """Take all adapters off; the denoiser is what it was before."""
        if self._keys:
            self._denoiser.unload_lora()
        self._keys, self._parameters, self._scales, self._trainable, self._active = {}, {}, {}, "", []

    def _inject(self, name: str, ranks: dict[str, int], *, scale: float = 1.0) -> None:
        """Add an adapter with a rank for each module, and make all adapters active and frozen but the trainable one."""
        from peft import LoraConfig
        from peft.functional import cast_adapter_dtype

        modules = dict(self._denoiser.named_modules())
        missing = [module for module in ranks if module not in modules]
        if name in self._keys or missing or not ranks:
            problem = "is there already" if name in self._keys else f"has no module {missing[0]!r}" if missing else "is empty"
            raise UsageError(f"Adapter '{name}' {problem}.")
        key = f"bank_{len(self._keys)}"
        patterns = {f"^{re.escape(module)}": rank for module, rank in ranks.items()}
        rank = next(iter(ranks.values()))
        config = LoraConfig(
            r=rank,
            lora_alpha=scale * rank,  # type: ignore[arg-type]  # a float as good as an int
            rank_pattern=patterns if set(ranks.values()) != {rank} else {},
            alpha_pattern=patterns if set(ranks.values()) != {rank} else {},
            target_modules="|".join(re.escape(module) for module in ranks),  # a text is matched in full, a list by suffix
        )
        with quiet(), torch.random.fork_rng(devices=[]):  # peft draws initial weights that are overwritten
            self._denoiser.add_adapter(config, key)
        cast_adapter_dtype(self._denoiser, key)
        mark = re.compile(rf"\.(lora_[AB])\.{key}\.weight$")
        named = self._denoiser.named_parameters()
        self._parameters[name] = {mark.sub(r".\1.weight", n): p for n, p in named if mark.search(n)}
        self._keys[name], self._scales[name] = key, scale
        self._activate(self.names)

    def _freeze(self) -> None:
        """Only the trainable adapter has gradients: activating adapters turns them on for all."""
        for name, parameters in self._parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name == self._trainable)
