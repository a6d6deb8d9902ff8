"""How much memory a pass takes, found without any: real models at full size, their tensors fake, every storage counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erasekit.backbones.memory import GIB

RANK = 4


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that come up and go while it is on, those of `own` tensors left out."""

    def __init__(self, own: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in own}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def fake(model_class: Any, config: Any, targets: str, *, checkpointing: bool) -> Iterator[tuple[nn.Module, list[torch.Tensor]]]:
    """A model of fake tensors in bfloat16, a LoRA on the layers whose names end with `targets`, and all that it owns."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = model_class.from_config(config).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        if checkpointing:
            model.enable_gradient_checkpointing()
        own = [*model.parameters(), *model.buffers()]
        for name, layer in model.named_modules():
            if targets and name.endswith(targets):
                down = torch.zeros(RANK, layer.in_features, requires_grad=True)
                up = torch.zeros(layer.out_features, RANK, requires_grad=True)
                own += [down, up]
                layer.register_forward_hook(lambda m, i, o, d=down, u=up: o + (i[0].float() @ d.T @ u.T).to(o.dtype))
        yield model, own


def unet_call(model: nn.Module, size: int, rows: int) -> torch.Tensor:
    """A prediction of Stable Diffusion's UNet."""
    x = torch.zeros(rows, 4, size // 8, size // 8, dtype=torch.bfloat16)
    text = torch.zeros(rows, 77, 768, dtype=torch.bfloat16)
    return model(x, torch.zeros(rows), encoder_hidden_states=text, return_dict=False)[0]


def xl_call(model: nn.Module, size: int, rows: int) -> torch.Tensor:
    """A prediction of SDXL's UNet."""
    half = {"dtype": torch.bfloat16}
    x, text = torch.zeros(rows, 4, size // 8, size // 8, **half), torch.zeros(rows, 77, 2048, **half)
    added = {"text_embeds": torch.zeros(rows, 1280, **half), "time_ids": torch.zeros(rows, 6, **half)}
    return model(x, torch.zeros(rows), encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


def flux_call(model: nn.Module, size: int, rows: int) -> torch.Tensor:
    """A prediction of FLUX's transformer."""
    tokens, half = (size // 16) ** 2, {"dtype": torch.bfloat16}
    return model(
        hidden_states=torch.zeros(rows, tokens, 64, **half),
        timestep=torch.zeros(rows, **half),
        guidance=torch.zeros(rows),
        encoder_hidden_states=torch.zeros(rows, 512, 4096, **half),
        pooled_projections=torch.zeros(rows, 768, **half),
        txt_ids=torch.zeros(512, 3, **half),
        img_ids=torch.zeros(tokens, 3, **half),
        return_dict=False,
    )[0]


def sd3_call(model: nn.Module, size: int, rows: int) -> torch.Tensor:
    """A prediction of SD3.5's transformer."""
    half = {"dtype": torch.bfloat16}
    return model(
        hidden_states=torch.zeros(rows, 16, size // 8, size // 8, **half),
        timestep=torch.zeros(rows),
        encoder_hidden_states=torch.zeros(rows, 77 + 256, 4096, **half),
        pooled_projections=torch.zeros(rows, 2048, **half),
        return_dict=False,
    )[0]


def flux2_call(model: nn.Module, size: int, rows: int) -> torch.Tensor:
    """A prediction of FLUX.2's transformer."""
    tokens, half = (size // 16) ** 2, {"dtype": torch.bfloat16}
    return model(
        hidden_states=torch.zeros(rows, tokens, 128, **half),
        timestep=torch.zeros(rows, **half),
        encoder_hidden_states=torch.zeros(rows, 512, model.config.joint_attention_dim, **half),
        txt_ids=torch.zeros(512, 4, dtype=torch.long),
        img_ids=torch.zeros(tokens, 4, dtype=torch.long),
        return_dict=False,
    )[0]


def gib(peak: Peak) -> float:
    """The peak in GiB."""
    return peak.peak / GIB
