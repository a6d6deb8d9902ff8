"""The Stable Diffusion backbone against diffusers itself."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

from erasekit.backbones.protocol import Backbone, BackboneConfig, guided
from erasekit.backbones.sd import StableDiffusion, StableDiffusion14
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.registration import plugins
from erasekit.testing import tiny

PROMPTS = ["a photo of a cat", "a dog by vint"]


@pytest.fixture(scope="module", params=["tiny", "kl"])
def folder(request, tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / f"sd-{request.param}", vae=request.param)


@pytest.fixture(scope="module")
def backbone(folder):
    return tiny.load(folder)


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@torch.no_grad()
def sample(backbone, prompts, seeds, *, steps, scale):
    """The pipeline's loop, written with the backbone's parts only."""
    schedule, cond, empty = backbone.schedule(steps), backbone.encode(prompts), backbone.encode([""])
    x = backbone.latents(seeds)
    for k in range(steps):
        tau = schedule.tau[k].expand(len(x))
        x = backbone.step(guided(backbone, x, tau, cond, uncond=empty, scale=scale), x, k, schedule)
    return x


def test_it_is_a_backbone(backbone):
    assert isinstance(backbone, Backbone)
    assert (StableDiffusion.name, StableDiffusion14.name, StableDiffusion.domain) == ("sd15", "sd14", "natural")
    assert backbone.capabilities.names() == {"unet", "epsilon", "cfg", "causal"}
    assert not any(p.requires_grad for p in backbone.denoiser.parameters())


def test_sampling_is_the_pipelines_own(backbone):
    """Latents, encoding, prediction, guidance, schedule and step in one: the same latents as a plain pipeline call."""
    pipe = StableDiffusionPipeline.from_pretrained(backbone._folder, safety_checker=None)
    theirs = pipe(PROMPTS, num_inference_steps=5, guidance_scale=4.0, generator=generators(7, 8), output_type="latent").images
    torch.testing.assert_close(sample(backbone, PROMPTS, [7, 8], steps=5, scale=4.0), theirs, atol=1e-4, rtol=1e-4)


def test_encoded_prompts_give_the_pipeline_the_same_images(backbone):
    pipe, usual = backbone.pipeline(), {"num_inference_steps": 3, "output_type": "np"}
    plain = pipe(PROMPTS[0], guidance_scale=4.0, generator=generators(7), **usual).images
    arguments = backbone.call_arguments(backbone.encode(PROMPTS[:1]), empty=backbone.encode([""]), guidance=4.0)
    assert (pipe(**arguments, generator=generators(7), **usual).images == plain).all()


def test_latents_are_what_the_pipeline_draws(backbone):
    pipe, seen = backbone.pipeline(), []
    unet = pipe.unet.forward
    pipe.unet.forward = lambda x, *a, **k: seen.append(x.clone()) or unet(x, *a, **k)
    pipe(PROMPTS, num_inference_steps=1, guidance_scale=1.0, generator=generators(7, 8))
    assert torch.equal(seen[0], backbone.latents([7, 8]))
    assert backbone.latents([7], size=32).shape == (1, 4, 16, 16)


def test_decoding_is_the_pipelines_own(backbone):
    pipe, x = backbone.pipeline(), backbone.latents([7, 8]).requires_grad_()
    image = backbone.decode(x)
    theirs = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert image.shape == (2, 3, 16, 16)
    torch.testing.assert_close(image, theirs)
    image.sum().backward()
    assert x.grad is not None


def test_the_direction_of_time(backbone):
    """tau 0 is pure noise and tau 1 the image. Every statement here fails if tau is turned round."""
    x0, noise = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    early, late = backbone.add_noise(x0, noise, torch.tensor([0.05, 0.95])).mean((1, 2, 3))
    assert early > 0.9 > 0.3 > late
    schedule = backbone.schedule(10)
    assert (schedule.tau.diff() > 0).all()
    assert (schedule.timesteps.diff() < 0).all()
    assert schedule.tau[0] == 0
    assert schedule.first_late(0.15) == 2
    seen = []
    forward = backbone.denoiser.forward
    backbone.denoiser.forward = lambda x, t, **k: seen.append(t.tolist()) or forward(x, t, **k)
    try:
        backbone.predict(x0, torch.tensor([0.05, 0.95]), backbone.encode(PROMPTS))
    finally:
        del backbone.denoiser.forward
    assert seen == [[949, 49]]  # DDPM's timestep falls while the image appears


def test_noise_and_x0_are_inverse(backbone):
    x0, noise, tau = backbone.latents([1, 2]), backbone.latents([3, 4]), torch.tensor([0.1, 0.9])
    x = backbone.add_noise(x0, noise, tau)
    torch.testing.assert_close(backbone.to_x0(noise, x, tau), x0, atol=1e-4, rtol=1e-4)
    scheduler = DDIMScheduler.from_config(backbone._pipe.scheduler.config)
    torch.testing.assert_close(x, scheduler.add_noise(x0, noise, torch.tensor([899, 99])))


def test_steps_are_ddims(backbone):
    schedule, x = backbone.schedule(5), backbone.latents([1])
    epsilon = backbone.latents([2])
    a = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    t, s = (int(v) for v in schedule.timesteps[1:3])
    x0 = (x - (1 - a[t]).sqrt() * epsilon) / a[t].sqrt()
    want = a[s].sqrt() * x0 + (1 - a[s]).sqrt() * epsilon
    torch.testing.assert_close(backbone.step(epsilon, x, 1, schedule).double(), want.double(), atol=1e-5, rtol=1e-5)
    backbone.schedule(3)  # another schedule in between does not disturb
    torch.testing.assert_close(backbone.step(epsilon, x, 1, schedule).double(), want.double(), atol=1e-5, rtol=1e-5)


def test_sites_and_scopes_are_found_by_name(backbone):
    modules = dict(backbone.denoiser.named_modules())
    sites = backbone.text_sites()
    assert {s.reads for s in sites} == {"tokens"}
    assert {modules[s.name].in_features for s in sites} == {tiny.WIDTH}
    by_shape = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear) and m.in_features == tiny.WIDTH and "attn" in n]
    assert [s.name for s in sites] == by_shape
    kv, qk, cross, attention, everything = (backbone.lora_targets(s) for s in ("kv", "qk", "cross", "attention", "all"))
    assert set(kv) < set(cross) < set(attention) < set(everything)
    assert {n for n in qk if n.endswith(".to_k")} == set(kv) & set(qk)
    assert set(qk) < set(cross) - {n for n in kv if n.endswith(".to_v")}
    assert len(cross) == 2 * len(kv)
    assert len(attention) == 2 * len(cross)
    with pytest.raises(UsageError, match=r"Unknown scope 'kvs'.*kv, qk, cross, attention, all"):
        backbone.lora_targets("kvs")


def test_prompts_are_encoded_once_and_alike_in_any_company(backbone):
    both = backbone.encode(PROMPTS)
    fresh = tiny.load(backbone._folder)
    assert torch.equal(fresh.encode(PROMPTS[1:]).tokens, both.tokens[1:])
    assert both.tokens.shape == (2, tiny.LENGTH, tiny.WIDTH)
    assert both.lengths.tolist() == [7, 6]
    assert backbone.encode([""]).lengths.tolist() == [2]
    assert len(fresh.encode(["a " * 99])) == 1
    assert fresh.encode([]).tokens.shape == (0, tiny.LENGTH, tiny.WIDTH)


def test_spans_are_token_positions(backbone):
    assert backbone.spans("a photo of a cat", "a cat") == [range(4, 6)]
    assert backbone.spans("A Cat, a cat and a kitten", "cat") == [range(2, 3), range(5, 6)]
    assert backbone.spans("a photo of cats", "cat") == []
    assert backbone.spans("a cat", "") == []
    embeddings = backbone.encode(["a photo of a cat", "a photo of a dog"]).tokens
    first = int((embeddings[0] - embeddings[1]).abs().amax(1).gt(1e-5).nonzero()[0])
    assert backbone.spans("a photo of a cat", "cat")[0].start == first


def test_fingerprint_is_of_the_weights_not_of_how_they_are_held(backbone, folder, tmp_path):
    assert tiny.load(folder, dtype="bfloat16").fingerprint() == backbone.fingerprint()
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert tiny.load(tmp_path / "elsewhere").fingerprint() == backbone.fingerprint()
    assert tiny.load(tiny.save_pipeline(tmp_path / "other", seed=1)).fingerprint() != backbone.fingerprint()


def test_fingerprint_of_shards_is_that_of_one_file(backbone, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sharded")
    shutil.rmtree(tmp_path / "sharded" / "unet")
    backbone.denoiser.save_pretrained(tmp_path / "sharded" / "unet", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    assert tiny.load(tmp_path / "sharded").fingerprint() == backbone.fingerprint()


def test_pipelines_are_fresh(backbone):
    one, two = backbone.pipeline(), backbone.pipeline()
    with torch.no_grad():
        next(one.unet.parameters()).zero_()
    assert next(two.unet.parameters()).any()
    assert next(backbone.denoiser.parameters()).any()
    assert one.safety_checker is None


def test_released_parts_are_gone_and_what_was_encoded_stays(folder):
    backbone = tiny.load(folder)
    cond, denoiser = backbone.encode(PROMPTS), backbone.denoiser
    for part in ("text_encoders", "vae", "denoiser"):
        backbone.release(part)
    assert torch.equal(backbone.encode(PROMPTS).tokens, cond.tokens)
    assert all(p.is_meta for p in denoiser.parameters())
    assert torch.equal(backbone.encode([PROMPTS[1], "a ship"]).tokens[0], cond.tokens[1]), "loaded again for a new prompt"
    assert backbone.spans("a cat", "cat") == [range(2, 3)]
    assert backbone.pipeline()(PROMPTS[0], num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    assert len(backbone.fingerprint()) == 64


def test_a_scheduler_of_another_kind_is_sampled_with_ddim(folder, tmp_path):
    """SD1.5 ships a PNDM config, which says nothing of clipping."""
    shutil.copytree(folder, tmp_path / "pndm")
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True).save_pretrained(
        tmp_path / "pndm" / "scheduler"
    )
    index = json.loads((tmp_path / "pndm" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (tmp_path / "pndm" / "model_index.json").write_text(json.dumps(index))
    backbone = tiny.load(tmp_path / "pndm")
    large = 9 * torch.ones(1, 4, 8, 8)
    assert backbone.step(torch.zeros_like(large), large, 4, backbone.schedule(5)).abs().max() > 5  # not clipped to 1
    assert backbone.schedule(5).tau[0] == 0


def problem(path, **config):
    with pytest.raises(EnvironmentProblem) as error:
        tiny.TinySD.load(BackboneConfig(path=str(path), device="cpu", **config))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_is_said_in_one_line(folder, tmp_path, monkeypatch):
    assert "There is no folder" in problem(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no model_index.json" in problem(tmp_path / "empty")
    assert "There is no folder 'nonsense'" in problem("nonsense")
    shutil.copytree(folder, tmp_path / "cut")
    file = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "'cut' could not be loaded" in problem(tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "unet")
    assert "'cut' could not be loaded" in problem(tmp_path / "cut")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = problem("somebody/something")
    assert message.startswith("'somebody/something' could not be downloaded")
    assert message.endswith("-s backbone.path=FOLDER")


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "xpu"])
def test_a_device_that_is_not_there(folder, device):
    with pytest.raises(EnvironmentProblem, match=f"Device '{device}' cannot be used") as error:
        tiny.TinySD.load(BackboneConfig(path=str(folder), device=device))
    assert "\n" not in str(error.value)


def test_a_local_base_is_named_without_its_parents(backbone, folder):
    assert (backbone.source, backbone.revision) == (folder.name, "")


def test_a_model_that_predicts_velocity_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "v")
    config = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    assert "predicts v_prediction; 'tiny' needs a model that predicts epsilon" in problem(tmp_path / "v")


def test_the_built_in_plugin_registers_both():
    backbones = plugins.default().backbones
    assert backbones.get("sd15") is StableDiffusion
    assert backbones.get("sd14") is StableDiffusion14
