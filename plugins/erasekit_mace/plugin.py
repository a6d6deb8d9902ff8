"""Registers MACE and where its masks come from."""

from __future__ import annotations

from erasekit.registration.hookspecs import Register, RegisterComponent, hookimpl


@hookimpl
def register_methods(register: Register) -> None:
    """Register MACE."""
    register(
        "mace",
        "erasekit_mace.method:Mace",
        summary="co-occurring words refined, attention suppressed inside masks, LoRAs fused",
        paper="arXiv:2403.06135",
    )


@hookimpl
def register_components(register: RegisterComponent) -> None:
    """Register the choices of MACE's slot."""
    for name, target, summary in (
        ("attention", "masks:attention", "the base's own attention to the concept, thresholded; a style has the whole image"),
        ("whole", "masks:whole", "the whole image"),
        ("grounded-sam", "segmenter:grounded_sam", "what Grounding DINO finds by the concept's phrases, outlined by SAM"),
    ):
        register("masks", name, f"erasekit_mace.{target}", summary=summary)
