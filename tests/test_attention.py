"""Attention maps against projections, rotations and softmax written out in float64, and against what the layers put out."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from diffusers.models.transformers.transformer_flux2 import Flux2Attention

from erasekit.backbones.attention import attention_maps, token_positions
from erasekit.errors import UsageError
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.images import draw, noised
from erasekit.testing import tiny
from tests.third_party.tiny_world import Words

PROMPTS = ["a photo of a cat", "cat by the red ship"]


def inputs(backbone):
    x = torch.randn(backbone.latents([0, 1], 16).shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.3, 0.8]), backbone.encode(PROMPTS)


def calls(denoiser, kind):
    """What each attention layer of a kind is given and puts out, collected into a dict by the layer's path."""
    seen, handles = {}, []
    for name, module in denoiser.named_modules():
        if isinstance(module, kind):
            record = lambda m, args, named, output, name=name: seen.update({name: (args, named, output)})  # noqa: E731
            handles.append(module.register_forward_hook(record, with_kwargs=True))
    return seen, handles


def linear(layer, x):
    y = x @ layer.weight.detach().double().numpy().T
    return y if layer.bias is None else y + layer.bias.detach().double().numpy()


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def heads(x, n):
    return x.reshape(*x.shape[:2], n, -1).transpose(0, 2, 1, 3)


def rms(layer, x):
    scale = 1.0 if layer.weight is None else layer.weight.detach().double().numpy()
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + (layer.eps or np.finfo(np.float32).eps)) * scale


def turned(x, ids, axes, theta=10000.0):
    """Rotary embedding: pairs of neighbouring channels are turned by place x frequency, axis by axis."""
    angles = np.concatenate(
        [np.outer(ids[:, a], theta ** (-np.arange(0, width, 2) / width)) for a, width in enumerate(axes)], axis=1
    )
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * np.cos(angles) - odd * np.sin(angles)
    out[..., 1::2] = even * np.sin(angles) + odd * np.cos(angles)
    return out


def test_cross_attention_is_the_softmax_of_the_scaled_products(sd):
    seen, handles = calls(sd.denoiser, Attention)
    with attention_maps(sd.denoiser) as maps, torch.no_grad():
        sd.predict(*inputs(sd))
    [handle.remove() for handle in handles]
    assert set(maps) == {name for name, _ in sd.denoiser.named_modules() if name.endswith(".attn2")}
    assert list(maps)[-1].startswith("up_blocks")  # in the order in which they run
    for name, attention in maps.items():
        module, (args, named, output) = sd.denoiser.get_submodule(name), seen[name]
        image, text = args[0].double().numpy(), named["encoder_hidden_states"].double().numpy()
        q, k, v = (
            heads(linear(layer, x), module.heads)
            for layer, x in ((module.to_q, image), (module.to_k, text), (module.to_v, text))
        )
        want = softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]))
        np.testing.assert_allclose(attention.numpy(), want, atol=1e-5)
        mixed = (attention.double().numpy() @ v).transpose(0, 2, 1, 3).reshape(*image.shape[:2], -1)
        np.testing.assert_allclose(linear(module.to_out[0], mixed), output.numpy(), atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_joint_attention_is_the_texts_columns_of_the_softmax(family, request):
    """In FLUX.2 text tokens have places, on an axis of their own."""
    flux = request.getfixturevalue(family)
    seen, handles = calls(flux.denoiser, FluxAttention if family == "flux" else Flux2Attention)
    x, tau, cond = inputs(flux)
    with attention_maps(flux.denoiser) as maps, torch.no_grad():
        flux.predict(x, tau, cond)
    [handle.remove() for handle in handles]
    assert list(maps) == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    text, side = cond.tokens.shape[1], math.isqrt(x.shape[1])
    places = [(0, i // side, i % side) for i in range(side * side)]
    ids, theta = np.concatenate([np.zeros((text, 3)), np.array(places, dtype=float)]), 10000.0
    if family == "flux2":
        ids, theta = np.concatenate([ids, np.arange(len(ids))[:, None] * (np.arange(len(ids)) < text)[:, None]], 1), 2000.0
    for name, attention in maps.items():
        module, (_, named, output) = flux.denoiser.get_submodule(name), seen[name]
        image, words = (named[key].double().numpy() for key in ("hidden_states", "encoder_hidden_states"))
        parts = {}
        for part, own, added in (("q", "to_q", "add_q_proj"), ("k", "to_k", "add_k_proj"), ("v", "to_v", "add_v_proj")):
            parts[part] = [
                heads(linear(getattr(module, layer), x), module.heads) for layer, x in ((added, words), (own, image))
            ]
        q, k = (
            turned(np.concatenate([rms(getattr(module, f"norm_added_{p}"), a), rms(getattr(module, f"norm_{p}"), b)], 2), ids,
                   flux.denoiser.config.axes_dims_rope, theta)
            for p, (a, b) in (("q", parts["q"]), ("k", parts["k"]))
        )  # fmt: skip
        whole = softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]))
        np.testing.assert_allclose(attention.numpy(), whole[:, :, text:, :text], atol=1e-5)
        assert (attention.sum(-1) < 1).all()
        mixed = (whole @ np.concatenate(parts["v"], 2)).transpose(0, 2, 1, 3).reshape(len(x), len(ids), -1)
        np.testing.assert_allclose(linear(module.to_out[0], mixed[:, text:]), output[0].numpy(), atol=1e-4)


def test_joint_attention_without_places_is_the_texts_columns_of_the_softmax(sd3):
    """SD3.5's norms act on each head; a layer in which the image attends to itself alone has no map."""
    seen, handles = calls(sd3.denoiser, Attention)
    x, tau, cond = inputs(sd3)
    with attention_maps(sd3.denoiser) as maps, torch.no_grad():
        sd3.predict(x, tau, cond)
    [handle.remove() for handle in handles]
    assert list(maps) == [f"transformer_blocks.{i}.attn" for i in range(3)]
    assert "transformer_blocks.0.attn2" in seen
    for name, attention in maps.items():
        module, (_, named, output) = sd3.denoiser.get_submodule(name), seen[name]
        image, words = (named[key].double().numpy() for key in ("hidden_states", "encoder_hidden_states"))
        q, k, v = (
            [
                heads(linear(getattr(module, layer), x), module.heads)
                for layer, x in ((f"to_{p}", image), (f"add_{p}_proj", words))
            ]
            for p in "qkv"
        )
        q, k = (
            np.concatenate([rms(getattr(module, f"norm_{p}"), a), rms(getattr(module, f"norm_added_{p}"), b)], 2)
            for p, (a, b) in (("q", q), ("k", k))
        )
        whole, n = softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])), image.shape[1]
        np.testing.assert_allclose(attention.numpy(), whole[:, :, :n, n:], atol=1e-5)
        mixed = (whole @ np.concatenate(v, 2)).transpose(0, 2, 1, 3).reshape(len(x), whole.shape[2], -1)
        np.testing.assert_allclose(linear(module.to_out[0], mixed[:, :n]), output[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "flux2"])
def test_maps_follow_the_adapters_and_carry_gradients(family, request):
    backbone = request.getfixturevalue(family)
    bank = AdapterBank(backbone)
    bank.add("keys", backbone.lora_targets("kv" if family == "sd" else "add_kv"), 2, torch.Generator().manual_seed(0))
    parameters = bank.train_only("keys")
    with attention_maps(backbone.denoiser) as maps:
        backbone.predict(*inputs(backbone))
        fresh = copy.copy(maps)
        torch.stack([m.square().mean() for m in maps.values()]).sum().backward()
        assert sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None) > 0
        with torch.no_grad():
            for p in parameters:
                p.add_(0.3)
            backbone.predict(*inputs(backbone))
        assert all(not torch.allclose(maps[name], fresh[name], atol=1e-3) for name in fresh)
        with torch.no_grad(), bank.teacher():
            backbone.predict(*inputs(backbone))
        torch.testing.assert_close(maps, fresh, rtol=1e-4, atol=1e-5)
    bank.remove()


def test_nothing_is_left_on_the_denoiser(sd):
    with attention_maps(sd.denoiser) as maps, torch.no_grad():
        sd.predict(*inputs(sd))
    assert not any(module._forward_hooks for module in sd.denoiser.modules())
    before = dict(maps)
    sd.predict(*inputs(sd))
    assert all(maps[name] is before[name] for name in before)


def test_a_denoiser_without_attention_to_text_is_refused(sd):
    with pytest.raises(UsageError, match="no attention to text"), attention_maps(sd.vae):
        pass


@pytest.mark.parametrize(("family", "begins"), [("sd", [1]), ("flux", [0]), ("flux2", [3]), ("sd3", [1, tiny.LENGTH])])
def test_positions_are_the_spans(family, begins, request):
    backbone = request.getfixturevalue(family)
    found = token_positions(backbone, PROMPTS, ["cat", "red ship", "dog"])
    assert found.shape == backbone.encode(PROMPTS).tokens.shape[:2]
    assert found[0].nonzero().flatten().tolist() == [begin + 4 for begin in begins]
    assert found[1].nonzero().flatten().tolist() == [begin + place for begin in begins for place in (0, 3, 4)]


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_drawn_images_are_the_pipelines(family, request):
    backbone, task = request.getfixturevalue(family), Words()
    ctx = RunContext(backbone, (task.concept("cat"),), task)
    ctx.protocol = task.protocol.model_copy(update={"steps": 3, "batch": 1})
    cond, empty = backbone.encode(PROMPTS), backbone.encode([""])
    x0 = draw(ctx, cond, [7, 8])
    pipe = backbone.pipeline()
    if family == "sd":
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")
    call = backbone.call_arguments(cond, empty=empty, guidance=ctx.protocol.guidance)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    want = pipe(**call, height=16, width=16, num_inference_steps=3, generator=generators, output_type="latent").images
    torch.testing.assert_close(x0, want, rtol=1e-3, atol=1e-4)
    tau = torch.tensor([0.0, 1.0])
    noisy = noised(ctx, x0, tau, torch.Generator().manual_seed(0))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy, backbone.add_noise(x0, noise, tau))
    assert (noisy[1] - x0[1]).abs().mean() < 0.2 * (noisy[0] - x0[0]).abs().mean()
