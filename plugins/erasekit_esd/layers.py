"""Which linear layers each of ESD's variants trains."""

from __future__ import annotations

import re
from collections.abc import Iterable

from erasekit.backbones.protocol import Backbone
from erasekit.errors import UsageError

# What counts as the layers that read text: in a UNet the cross-attentions, in a transformer that attends to text and image
# together every attention, its text stream's `add_*` projections among them.
TEXT = {"unet": r"\.attn2\.", "dit": r"\.attn\."}
KEYS_AND_VALUES = {"unet": r"\.attn2\.to_[kv]$", "dit": r"\.attn\.(to_[kv]|add_[kv]_proj)$"}


def modules(backbone: Backbone, variant: str) -> list[str]:
    """The linear layers of a variant: x, x-strict, u or all.

    Raises:
        UsageError: the denoiser has none.
    """
    names = matching(backbone.lora_targets("all"), backbone.capabilities.family, variant)
    if not names:
        raise UsageError(f"Variant '{variant}' of ESD matches no linear layer of '{backbone.source}'.")
    return names


def matching(names: Iterable[str], family: str, variant: str) -> list[str]:
    """Those of a denoiser's linear layers that a variant trains."""
    pattern = {"x": TEXT, "x-strict": KEYS_AND_VALUES, "u": TEXT}.get(variant, {}).get(family, "")
    return [name for name in names if bool(re.search(pattern, name)) != (variant == "u")]
