"""How image tokens attend to text tokens, read from a denoiser while it predicts, and where a phrase's tokens stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from diffusers.models.transformers.transformer_flux2 import Flux2Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from erasekit.backbones.checkpointing import checkpointed
from erasekit.backbones.protocol import Backbone
from erasekit.errors import UsageError

Parts = dict[str, torch.Tensor]


@contextmanager
def attention_maps(denoiser: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Record the attention of image tokens to text tokens, softmax(q k^T / sqrt(d)), from the layers' own projections.

    In a UNet these are the cross-attentions; a row sums to one. In FLUX.1 and FLUX.2 they are the double blocks, in SD3.5 all:
    text and image tokens share one softmax, of which the columns of the text are kept, so a row sums to less than one.

    Adapters have to be on the denoiser already: they are put around the projections that are watched here.

    Yields:
        {path of the layer: (batch, heads, image tokens, text tokens)}, float32 and differentiable, in the order in
        which they run. Each forward pass writes it anew; it stays as it is when the context ends.

    Raises:
        UsageError: the denoiser has no such layers.
    """
    hooks = _Hooks(denoiser)

    def run(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), hooks))

    with hooks as maps, checkpointed(denoiser, run):
        yield maps


def token_positions(backbone: Backbone, prompts: Sequence[str], phrases: Sequence[str]) -> torch.Tensor:
    """Where any of the phrases stands in each prompt: (n, length), bool, on the backbone's device."""
    found = torch.zeros(backbone.encode(prompts).tokens.shape[:2], dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        for span in (span for phrase in phrases for span in backbone.spans(prompt, phrase)):
            found[row, span.start : span.stop] = True
    return found.to(backbone.device)


class _Hooks:
    """The hooks that write a denoiser's maps. Entered while they are on, they stay as they are; later they write new maps."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser, self._entered = denoiser, 0
        self._maps: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> dict[str, torch.Tensor]:
        if not self._entered:
            self._maps = {}
            self._handles = _register(self._denoiser, self._maps)
        self._entered += 1
        return self._maps

    def __exit__(self, *problem: object) -> None:
        self._entered -= 1
        if not self._entered:
            for handle in self._handles:
                handle.remove()
            self._maps, self._handles = {}, []


def _register(denoiser: nn.Module, maps: dict[str, torch.Tensor]) -> list[Any]:
    """Put the hooks on all layers that attend to text."""
    handles: list[Any] = []
    parts: dict[str, Any]
    for name, module in denoiser.named_modules():
        if isinstance(module, FluxAttention | Flux2Attention) and module.added_kv_proj_dim is not None:
            parts = {"query": module.norm_q, "key": module.norm_k, "text": module.norm_added_k}
            handles += _watch(module, parts, _joint, _write(maps, name))
        elif isinstance(module, Attention) and module.added_kv_proj_dim is not None:
            parts = {"query": module.to_q, "key": module.to_k, "text": module.add_k_proj}
            handles += _watch(module, parts, _unturned, _write(maps, name))
        elif isinstance(module, Attention) and module.is_cross_attention:
            handles += _watch(module, {"query": module.to_q, "key": module.to_k}, _cross, _write(maps, name))
    if not handles:
        kinds = "a UNet, SD3.5, FLUX.1 or FLUX.2"
        raise UsageError(f"A {type(denoiser).__name__} has no attention to text that can be read; use {kinds}.")
    return handles


def _watch(
    attention: nn.Module,
    parts: Mapping[str, Any],
    combine: Callable[[Any, Parts, dict[str, Any]], torch.Tensor],
    write: Callable[[torch.Tensor], None],
) -> list[Any]:
    """Keep what the parts of a layer put out, and combine it into a map when the layer is done."""
    seen: Parts = {}

    def keep(key: str) -> Callable[..., None]:
        return lambda module, arguments, output: seen.update({key: output})

    def finish(module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        write(combine(module, seen, named))
        seen.clear()

    handles = [part.register_forward_hook(keep(key)) for key, part in parts.items()]
    return [*handles, attention.register_forward_hook(finish, with_kwargs=True)]


def _write(maps: dict[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], None]:
    return lambda value: maps.update({name: value})


def _cross(attention: Any, seen: Parts, named: dict[str, Any]) -> torch.Tensor:
    """Cross-attention: the queries are the image's, the keys the text's."""
    query, key = (seen[part].unflatten(-1, (attention.heads, -1)) for part in ("query", "key"))
    return _softmax(query, key)


def _joint(attention: Any, seen: Parts, named: dict[str, Any]) -> torch.Tensor:
    """Joint attention: the image's queries over the keys of text and image, turned by their places; the text's columns."""
    text = seen["text"].shape[1]
    turn = named["image_rotary_emb"]
    key: Any = apply_rotary_emb(torch.cat([seen["text"], seen["key"]], 1), turn, sequence_dim=1)  # Any: its type is wrong
    query: Any = apply_rotary_emb(seen["query"], tuple(table[text:] for table in turn), sequence_dim=1)
    return _softmax(query, key)[..., :text]


def _unturned(attention: Any, seen: Parts, named: dict[str, Any]) -> torch.Tensor:
    """Joint attention without places (SD3.5), whose norms act on each head by itself; the text's columns."""
    norms = {"query": attention.norm_q, "key": attention.norm_k, "text": attention.norm_added_k}
    split = {part: seen[part].unflatten(-1, (attention.heads, -1)) for part in norms}
    query, key, text = (split[part] if norm is None else norm(split[part]) for part, norm in norms.items())
    return _softmax(query, torch.cat([text, key], 1))[..., : text.shape[1]]


def _softmax(query_BIHD: torch.Tensor, key_BTHD: torch.Tensor) -> torch.Tensor:
    logits = torch.einsum("bihd,bthd->bhit", query_BIHD.float(), key_BTHD.float())
    attention: torch.Tensor = (logits / query_BIHD.shape[-1] ** 0.5).softmax(-1)
    return attention
