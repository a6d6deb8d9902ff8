"""What is predicted of a pass at full size is what fake tensors of the real configurations take; no GPU is needed for it."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from erasekit.backbones.attention import attention_maps
from erasekit.backbones.flux import Flux
from erasekit.backbones.flux2 import Flux2KleinBase4B, Flux2KleinBase9B
from erasekit.backbones.held import of_diffusers
from erasekit.backbones.sd import StableDiffusion
from erasekit.backbones.sd3 import StableDiffusion35Large, StableDiffusion35Medium
from erasekit.backbones.sdxl import StableDiffusionXL
from tests.fake_memory import Peak, fake, flux2_call, flux_call, gib, sd3_call, unet_call, xl_call

SD = (StableDiffusion, unet_call, ("attn2.to_k", "attn2.to_v"))
XL = (StableDiffusionXL, xl_call, ("attn2.to_k", "attn2.to_v"))
FLUX = (Flux, flux_call, ("attn.add_k_proj", "attn.add_v_proj"))
MEDIUM, LARGE = ((kind, sd3_call, FLUX[2]) for kind in (StableDiffusion35Medium, StableDiffusion35Large))
KLEIN_4B, KLEIN_9B = ((kind, flux2_call, FLUX[2]) for kind in (Flux2KleinBase4B, Flux2KleinBase9B))


def taken(model, size, *, rows=1, grad=True, checkpointing=False, maps=False):
    """GiB of a forward pass, or of one with its backward pass."""
    backbone, call, targets = model
    name, config = backbone.architecture
    with fake(of_diffusers(name), config, targets, checkpointing=checkpointing) as (denoiser, own):
        watch = attention_maps(denoiser) if maps else nullcontext({})
        with Peak(own) as peak, torch.set_grad_enabled(grad), watch as seen:
            losses = [t.float().square().mean() for t in (call(denoiser, size, rows), *seen.values())]
            del seen, watch
            if grad:
                torch.stack(losses).sum().backward()
    return gib(peak)


@pytest.mark.parametrize(
    ("model", "size", "what", "how"),
    [
        (SD, 512, "forward", {"grad": False, "rows": 2}),
        (SD, 512, "kept", {"rows": 2}),
        (SD, 512, "checkpointed", {"rows": 2, "checkpointing": True}),
        (XL, 1024, "forward", {"grad": False}),
        (XL, 1024, "checkpointed", {"checkpointing": True}),
        (FLUX, 512, "forward", {"grad": False}),
        (FLUX, 512, "kept", {}),
        (FLUX, 512, "checkpointed", {"checkpointing": True}),
        (FLUX, 1024, "checkpointed", {"checkpointing": True}),
        (MEDIUM, 1024, "forward", {"grad": False}),
        (MEDIUM, 1024, "checkpointed", {"checkpointing": True}),
        (LARGE, 1024, "checkpointed", {"checkpointing": True}),
        (KLEIN_4B, 1024, "forward", {"grad": False}),
        (KLEIN_4B, 1024, "kept", {}),
        (KLEIN_4B, 512, "checkpointed", {"checkpointing": True}),
        (KLEIN_9B, 512, "forward", {"grad": False}),
        (KLEIN_9B, 1024, "checkpointed", {"checkpointing": True}),
    ],
)
def test_a_row_takes_what_is_predicted(model, size, what, how):
    found = taken(model, size, **how) / how.get("rows", 1)
    said = getattr(model[0].activations(size), what)
    assert found <= said < 1.06 * found


@pytest.mark.parametrize(("model", "size"), [(SD, 512), (FLUX, 512), (MEDIUM, 512), (KLEIN_4B, 512)])
def test_attention_maps_take_what_is_predicted(model, size):
    found, said = taken(model, size, maps=True), model[0].activations(size)
    assert found <= said.kept + said.maps < 1.06 * found


def test_decoding_takes_what_is_predicted():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    config = {**blocks, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    with fake(AutoencoderKL, config, "", checkpointing=False) as (vae, own), Peak(own) as peak, torch.no_grad():
        vae.decode(torch.zeros(1, 4, 64, 64, dtype=torch.bfloat16))
    for backbone in (StableDiffusion, Flux, StableDiffusion35Medium, StableDiffusion35Large):
        assert gib(peak) <= backbone.activations(512).decode < 1.06 * gib(peak)


def test_decoding_the_latents_of_flux2_takes_what_is_predicted():
    with fake(AutoencoderKLFlux2, {}, "", checkpointing=False) as (vae, own), Peak(own) as peak, torch.no_grad():
        vae.decode(torch.zeros(1, 32, 64, 64, dtype=torch.bfloat16))
    assert gib(peak) <= Flux2KleinBase4B.activations(512).decode < 1.06 * gib(peak)


@pytest.mark.parametrize("model", [SD, XL, FLUX, MEDIUM, LARGE, KLEIN_4B, KLEIN_9B])
def test_the_sizes_of_the_weights_are_those_of_the_real_configuration(model):
    backbone = model[0]
    name, config = backbone.architecture
    with torch.device("meta"):
        model = of_diffusers(name).from_config(config)
    elements = sum(t.numel() for t in model.state_dict().values())  # SD3.5's table of places is no parameter
    assert backbone.sizes_gb[0] == pytest.approx(2 * elements / 2**30, rel=0.01)
    sizes = backbone.linears(backbone.Config())
    assert sum(sizes.values()) < elements
    assert all(model.get_submodule(name).weight.numel() == n for name, n in sizes.items())
