"""The FLUX adapter on the real classes: what the pipeline does, where text enters, which way time runs."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch

from erasekit.backbones import parts
from erasekit.backbones.alignment import align
from erasekit.backbones.protocol import Backbone, guided
from erasekit.erasures.deltas import LowRank, merged
from erasekit.erasures.late_gate import LateGate
from erasekit.erasures.loading import load_into
from erasekit.errors import UsageError
from erasekit.methods import closedform
from erasekit.methods.adapters import AdapterBank
from erasekit.testing import tiny_flux

PROMPTS = ["a photo of a cat", "the red ship"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flux.save_pipeline(tmp_path_factory.mktemp("base") / "flux")


@pytest.fixture(scope="module")
def backbone(folder):
    return tiny_flux.load(folder)


def sampled(backbone, prompts, *, scale, steps=4, seeds=(1, 2)):
    """Final packed latents of the adapter's own loop."""
    schedule, cond, empty = backbone.schedule(steps), backbone.encode(prompts), backbone.encode([""])
    x = backbone.latents(seeds)
    with torch.no_grad():
        for k in range(steps):
            tau = schedule.tau[k].expand(len(x))
            x = backbone.step(guided(backbone, x, tau, cond, uncond=empty, scale=scale), x, k, schedule)
    return x


def drawn(backbone, prompts, *, scale, steps=4, seeds=(1, 2), kind="latent", pipe=None, **arguments):
    """What the plain pipeline draws from text."""
    call = {"prompt": prompts, "max_sequence_length": tiny_flux.POSITIONS, "guidance_scale": scale} | arguments
    if not backbone.embedded_guidance:
        call |= {"negative_prompt": [""] * len(prompts), "guidance_scale": 1.0, "true_cfg_scale": scale}
    generator = [torch.Generator().manual_seed(s) for s in seeds]
    size = {"height": backbone.size, "width": backbone.size}
    pipe = pipe or backbone.pipeline()
    return pipe(**call, **size, num_inference_steps=steps, generator=generator, output_type=kind).images


def test_it_is_a_backbone(backbone):
    assert isinstance(backbone, Backbone)
    assert backbone.embedded_guidance


@pytest.mark.parametrize("guidance", ["embedded", "cfg"])
def test_the_loop_is_the_pipelines(folder, guidance):
    backbone = tiny_flux.load(folder, guidance=guidance)
    torch.testing.assert_close(sampled(backbone, PROMPTS, scale=3.0), drawn(backbone, PROMPTS, scale=3.0), rtol=0, atol=2e-5)


def test_embedded_guidance_is_an_input_of_the_model(backbone):
    x, cond, tau = backbone.latents([1]), backbone.encode(PROMPTS[:1]), torch.tensor([0.5])
    assert not torch.allclose(backbone.predict(x, tau, cond, guidance=1.0), backbone.predict(x, tau, cond, guidance=4.0))


def test_with_true_guidance_the_model_is_told_one(folder, backbone):
    true = tiny_flux.load(folder, guidance="cfg")
    x, cond, tau = backbone.latents([1]), backbone.encode(PROMPTS[:1]), torch.tensor([0.5])
    assert torch.equal(true.predict(x, tau, cond, guidance=4.0), backbone.predict(x, tau, cond, guidance=1.0))


def test_encoded_prompts_draw_what_text_draws(backbone):
    call = backbone.call_arguments(backbone.encode(PROMPTS), empty=backbone.encode([""]), guidance=2.0)
    generator = [torch.Generator().manual_seed(s) for s in (1, 2)]
    images = backbone.pipeline()(
        **call, height=16, width=16, num_inference_steps=4, generator=generator, output_type="latent"
    ).images
    torch.testing.assert_close(images, drawn(backbone, PROMPTS, scale=2.0), rtol=0, atol=2e-5)


def test_decode_is_the_pipelines(backbone):
    latents = drawn(backbone, PROMPTS, scale=2.0)
    images = drawn(backbone, PROMPTS, scale=2.0, kind="np")
    mine = backbone.decode(latents).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(mine.numpy(), images, atol=2e-5)


def test_the_direction_of_time(backbone):
    """Fails if tau is reversed: at tau 0 there is only noise, at tau 1 only the image, and a step goes on to the image."""
    schedule = backbone.schedule(5)
    assert schedule.tau[0] == 0
    assert (schedule.tau.diff() > 0).all()
    x0, noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    ends = [backbone.add_noise(x0, noise, torch.tensor([t])) for t in (0.0, 1.0)]
    assert torch.equal(ends[0], noise)
    assert torch.equal(ends[1], x0)
    for k, tau in enumerate(schedule.tau):  # the exact velocity noise - x0 leads from any point to x0
        x = backbone.add_noise(x0, noise, tau[None])
        torch.testing.assert_close(backbone.to_x0(noise - x0, x, tau[None]), x0)
        following = schedule.tau[k + 1] if k + 1 < len(schedule) else torch.tensor(1.0)
        expected = backbone.add_noise(x0, noise, following[None])
        torch.testing.assert_close(backbone.step(noise - x0, x, k, schedule), expected, rtol=1e-5, atol=1e-5)


def test_sigmas_are_shifted_by_the_size(backbone):
    mu = 0.5 + (1.15 - 0.5) * (4**2 - 256) / (4096 - 256)
    s = np.linspace(1, 1 / 5, 5)
    expected = np.exp(mu) / (np.exp(mu) + (1 / s - 1))
    np.testing.assert_allclose(1 - backbone.schedule(5).tau.numpy(), expected, atol=1e-6)
    assert (backbone.schedule(5, 64).tau[1:] != backbone.schedule(5).tau[1:]).all()


def edit(backbone, concept, neutral):
    """Deltas of both sites that send the concept prompts to the neutral ones, hard constraints."""
    w, u = backbone.encode(concept), backbone.encode(neutral)
    pairs = {"tokens": align(w, u), "pooled": (w.pooled.double(), u.pooled.double())}
    deltas = {}
    for site in backbone.text_sites():
        rows = pairs[site.reads]
        eye = torch.eye(rows[0].shape[1], dtype=torch.float64)
        sums = closedform.Pairs.empty(len(eye)).add(*rows)
        deltas[site.name] = closedform.whitened([sums], eye, error=0)[0].delta(backbone.weight(site.name))
    return deltas


@pytest.mark.parametrize(("concept", "neutral"), [("a cat", "a dog"), ("a cat", "a red ship"), ("a red kitten", "thing")])
def test_whitened_makes_the_whole_forward_equal(folder, concept, neutral):
    """Exact at every T5 position, pads included, with other token counts, and with biases that are not edited."""
    backbone = tiny_flux.load(folder)
    with torch.no_grad():  # T5 of random weights hardly tells prompts apart at width 24: 12 positions are 12 constraints
        for site in backbone.text_sites():
            backbone.denoiser.get_submodule(site.name).bias.normal_(std=2.0)
    deltas = edit(backbone, [concept], [neutral])
    w, u = backbone.encode([concept]), backbone.encode([neutral])
    assert w.lengths != u.lengths or concept == "a cat"
    x = backbone.latents([3])
    with torch.no_grad():
        for tau in backbone.schedule(4).tau:
            base_w, base_u = (backbone.predict(x, tau[None], c, guidance=3.0) for c in (w, u))
            with merged(backbone.denoiser, deltas):
                erased = backbone.predict(x, tau[None], w, guidance=3.0)
            assert (erased - base_u).norm() < 1e-4 * base_u.norm()
            assert (base_w - base_u).norm() > 1e-3 * base_u.norm(), "the prompts were the same to begin with"


def test_counting_the_bias_twice_is_seen(folder):
    """What published code does: v* is the layer's output with its bias, the edit is fitted to it, the bias stays."""
    backbone = tiny_flux.load(folder)
    layer = backbone.denoiser.get_submodule("context_embedder")
    with torch.no_grad():
        layer.bias.normal_(std=2.0)
    deltas = edit(backbone, ["a cat"], ["a dog"])
    right = deltas["context_embedder"]
    wrong = LowRank(right.up + layer.bias.double()[:, None], right.down)
    w, u, x, tau = backbone.encode(["a cat"]), backbone.encode(["a dog"]), backbone.latents([3]), torch.tensor([0.3])
    with torch.no_grad():
        base = backbone.predict(x, tau, u)
        with merged(backbone.denoiser, deltas | {"context_embedder": wrong}):
            assert (backbone.predict(x, tau, w) - base).norm() > 1e-3 * base.norm()


@pytest.mark.parametrize(("scope", "number"), [("add_kv", 4), ("add_qk", 4), ("qk_dual", 8), ("all_attn", 22), ("text", 2)])
def test_scopes(backbone, scope, number):
    assert len(backbone.lora_targets(scope)) == number


def test_a_scope_that_matches_nothing_is_an_error(backbone, monkeypatch):
    monkeypatch.setattr(type(backbone), "scopes", {"none": r"^nothing$"})
    with pytest.raises(UsageError, match="matches no layer"):
        backbone.lora_targets("none")
    with pytest.raises(UsageError, match="Unknown scope 'kv'"):
        backbone.lora_targets("kv")


def test_the_teacher_is_the_base_bit_for_bit(backbone):
    x, cond, tau = backbone.latents([1, 2]), backbone.encode(PROMPTS), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        base = backbone.predict(x, tau, cond, guidance=3.0)
        bank = AdapterBank(backbone)
        try:
            for name in ("one", "two"):
                bank.add(name, backbone.lora_targets("qk_dual"), 2, torch.Generator().manual_seed(0))
            for name, parameter in backbone.denoiser.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
            assert not torch.allclose(backbone.predict(x, tau, cond, guidance=3.0), base)
            with bank.teacher():
                assert torch.equal(backbone.predict(x, tau, cond, guidance=3.0), base)
        finally:
            bank.remove()


def test_spans(backbone):
    ids = backbone._pipe.tokenizer_2("a photo of a red cat").input_ids
    (span,) = backbone.spans("a photo of a red cat", "red cat")
    assert backbone._pipe.tokenizer_2.convert_ids_to_tokens(ids[span.start : span.stop]) == ["▁red", "▁cat"]
    assert backbone.spans("a photo of a redcat", "red cat") == []


def test_closed_form_reads_two_tensors(tmp_path, monkeypatch):
    """A shard holds a tensor of 40 GB (a hole in the file): whoever reads it runs out of memory."""
    folder = tiny_flux.save_pipeline(tmp_path / "flux", shard="40KB")
    names = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(names) > 1
    _add_huge_tensor(names[-1], 10 << 30)
    read = []
    monkeypatch.setattr(
        parts, "read_tensor", lambda files, key, original=parts.read_tensor: read.append(key) or original(files, key)
    )
    backbone = tiny_flux.load(folder)
    deltas = edit(backbone, ["a cat"], ["a dog"])
    assert len(backbone.fingerprint(list(deltas))) == 64
    assert set(read) == {f"{site.name}.weight" for site in backbone.text_sites()}
    assert "transformer" not in backbone._parts, "the transformer was loaded"


def _add_huge_tensor(path, elements):
    """Append a float32 tensor of zeros to a safetensors file without writing its bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header["huge"] = {"dtype": "F32", "shape": [elements], "data_offsets": [len(body), len(body) + 4 * elements]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + body)
        file.truncate(8 + len(text) + len(body) + 4 * elements)


def test_erasure_loads_in_the_plain_pipeline(backbone, tmp_path):
    from erasekit.concepts import Concept
    from erasekit.erasures.erasure import Erasure

    deltas = edit(backbone, ["a cat"], ["a red ship"])
    base = {"repo": backbone.source, "revision": "", "sha256": backbone.fingerprint(list(deltas))}
    erasure = Erasure("edit", {}, (Concept.parse("cat"),), "tiny-flux", "transformer", base, {"cat": {"refine": deltas}})
    erasure.save(tmp_path / "erasure")
    pipe = backbone.pipeline()
    load_into(pipe, tmp_path / "erasure", base=backbone)
    erased = drawn(backbone, ["a cat"], scale=3.0, seeds=(5,), pipe=pipe)
    torch.testing.assert_close(erased, drawn(backbone, ["a red ship"], scale=3.0, seeds=(5,)), rtol=0, atol=1e-3)
    plain = backbone.pipeline()
    plain.load_lora_weights(str(tmp_path / "erasure"), weight_name="cat.safetensors", adapter_name="cat")
    assert torch.equal(drawn(backbone, ["a cat"], scale=3.0, seeds=(5,), pipe=plain), erased)


def test_late_gate(backbone, tmp_path):
    pipe, generator = backbone.pipeline(), torch.Generator().manual_seed(0)
    layers = {}
    for site in backbone.text_sites():
        out, width = backbone.weight(site.name).shape
        layers[f"transformer.{site.name}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        layers[f"transformer.{site.name}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    pipe.load_lora_weights(layers, adapter_name="cat")
    seen = {}
    for name in ("gated", "base"):
        if name == "base":
            pipe.disable_lora()
        gate = LateGate(pipe, tau0=0.3) if name == "gated" else None
        seen[name] = []

        def record(pipe, index, timestep, tensors, name=name, gate=gate):
            seen[name].append(tensors["latents"].clone())
            return gate(pipe, index, timestep, tensors) if gate else tensors

        drawn(backbone, PROMPTS, scale=2.0, steps=8, pipe=pipe, callback_on_step_end=record)
    late = backbone.schedule(8).tau >= 0.3
    equal = [torch.equal(a, b) for a, b in zip(seen["gated"], seen["base"], strict=True)]
    assert equal == [not late[: k + 1].any() for k in range(8)]
    assert 0 < sum(equal) < 8
