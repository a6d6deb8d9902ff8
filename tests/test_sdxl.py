"""The SDXL backbone against diffusers itself, and erasures from it."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from erasekit.backbones.alignment import align
from erasekit.backbones.protocol import Backbone, guided
from erasekit.backbones.sdxl import StableDiffusionXL
from erasekit.erasures.deltas import to_dense
from erasekit.erasures.loading import load_into
from erasekit.methods.context import RunContext
from erasekit.registration import plugins
from erasekit.runs.compute import compute, context
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from erasekit.testing import tiny_xl
from erasekit_uce.method import Uce, UceConfig
from tests.conftest import THIRD_PARTY
from tests.test_bf16 import FLOOR, RELATIVE
from tests.test_rows import ROWS, SHORT, SMALL, TIGHT, watched
from tests.third_party.tiny_world import Words

PROMPTS = ["a photo of a cat", "a dog by vint"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_xl.save_pipeline(tmp_path_factory.mktemp("base") / "xl")


@pytest.fixture(scope="module")
def backbone(folder):
    return tiny_xl.load(folder)


def plain(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    settings = {"clip_sample": False, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@torch.no_grad()
def sample(backbone, prompts, seeds, *, steps, scale):
    schedule, cond, empty = backbone.schedule(steps), backbone.encode(prompts), backbone.encode([""])
    x = backbone.latents(seeds)
    for k in range(steps):
        tau = schedule.tau[k].expand(len(x))
        x = backbone.step(guided(backbone, x, tau, cond, uncond=empty, scale=scale), x, k, schedule)
    return x


def test_it_is_a_backbone(backbone):
    assert isinstance(backbone, Backbone)
    assert backbone.capabilities.names() == {"unet", "epsilon", "cfg", "causal"}
    assert [site.reads for site in backbone.text_sites()].count("pooled") == 1


def test_sampling_is_the_pipelines_own(backbone, folder):
    """The empty prompt too, which the pipeline replaces by zeros."""
    usual = {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": generators(7, 8), "output_type": "latent"}
    theirs = plain(folder)(PROMPTS, **usual).images
    torch.testing.assert_close(sample(backbone, PROMPTS, [7, 8], steps=4, scale=4.0), theirs, atol=1e-4, rtol=1e-4)


def test_encoded_prompts_give_the_pipeline_the_same_images(backbone, folder):
    pipe, usual = plain(folder), {"num_inference_steps": 3, "output_type": "np"}
    theirs = pipe(PROMPTS[0], guidance_scale=4.0, generator=generators(7), **usual).images
    arguments = backbone.call_arguments(backbone.encode(PROMPTS[:1]), empty=backbone.encode([""]), guidance=4.0)
    assert (pipe(**arguments, generator=generators(7), **usual).images == theirs).all()


def test_ids_embed_as_prompts_encode(backbone):
    wanted = backbone.encode(PROMPTS)
    found = backbone.embed(backbone.tokenize(PROMPTS))
    for field in ("tokens", "pooled", "ids", "lengths"):
        torch.testing.assert_close(getattr(found, field), getattr(wanted, field), atol=1e-5, rtol=1e-5)
    second = {"text_encoder_2": backbone.tokenize(PROMPTS[1:])["text_encoder_2"]}
    mixed = backbone.embed(second, like=backbone.encode(PROMPTS[:1]))
    width = wanted.tokens.shape[-1] // 2
    torch.testing.assert_close(mixed.tokens[..., :width], wanted.tokens[:1, :, :width])
    torch.testing.assert_close(mixed.tokens[..., width:], wanted.tokens[1:, :, width:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.pooled, wanted.pooled[1:], atol=1e-5, rtol=1e-5)


def test_a_closed_form_reaches_both_entrances_of_text(backbone):
    """The tokens, and the summary that is read beside the size of the image, whose columns stay as they are."""
    task = Words()
    ctx = RunContext(backbone, (task.concept("cat"),), task)
    settings = {"bare": True, "tokens": "all", "guides": ("dog",), "ridge": 0.0, "preserve_scale": 0.0, "rank_error": 0.0}
    deltas = Uce(UceConfig(**settings)).erase(ctx).total()
    mine, goal = (backbone.encode([p]) for p in (ctx.concepts[0].phrases[0], "dog"))
    pairs = {"tokens": align(mine, goal), "pooled": (mine.pooled.double(), goal.pooled.double())}
    for site in backbone.text_sites():
        weight, (w, u) = backbone.weight(site.name).double(), pairs[site.reads]
        wanted = u @ weight.T
        assert (w @ weight.T - wanted).abs().max() > 1e-3
        torch.testing.assert_close(w @ (weight + to_dense(deltas[site.name])).T, wanted, atol=1e-6, rtol=1e-6)
    assert not deltas["add_embedding.linear_1"].down[:, -48:].any(), "the edit reads the size of the image"


@pytest.mark.parametrize("method", ["uce", "trace", "sld"])
def test_a_run_from_a_folder_to_its_report(folder, tmp_path, method):
    registries = plugins.load([THIRD_PARTY / "tiny_world.py", THIRD_PARTY / "natural_words.py"])
    settings = ["steps=2", "trajectories=2", "clean_trajectories=2", "batch=2", "rank=2"] if method == "trace" else []
    overrides = [f"backbone.path={folder}", "backbone.device=cpu", "protocol.size=16", "protocol.steps=3"]
    overrides += [f"method.{setting}" for setting in settings]
    config = build({"method": method, "backbone": "sdxl", "task": "words", "concepts": ("cat",)}, overrides=overrides)
    result = run(config, out=tmp_path, registries=registries)
    place = path_of(tmp_path, resolve(config, registries))
    assert result.counts["failed"] == 0
    assert (place / "report.html").is_file()
    pipe, erased = plain(folder), plain(folder)
    load_into(erased, place / "erasure", component=registries.components.get)
    usual = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    base, now = (p("a photo of a cat", generator=generators(1), **usual).images for p in (pipe, erased))
    assert not torch.allclose(base, now, rtol=0, atol=1e-6), "the erasure changes nothing"


@pytest.mark.parametrize("method", ["uce", "trace", "advunlearn"])
def test_no_call_has_more_rows_than_the_preset_and_bf16_agrees(folder, monkeypatch, method):
    """As `test_rows` and `test_bf16` have it of the other two families."""
    registries = plugins.load([THIRD_PARTY / "tiny_world.py", THIRD_PARTY / "natural_words.py"])
    monkeypatch.setattr(StableDiffusionXL, "holding", dict.fromkeys(StableDiffusionXL.holding, SMALL))
    monkeypatch.setattr(StableDiffusionXL, "_share_of", lambda self, x: 1.0)
    monkeypatch.setattr(StableDiffusionXL, "activations", classmethod(lambda cls, size: TIGHT))
    flags = {"method": method, "backbone": "sdxl", "task": "words", "concepts": ("cat", "dog")}
    losses = {}
    for dtype in ("float32", "bfloat16"):
        held = [f"backbone.path={folder}", "backbone.device=cpu", f"backbone.dtype={dtype}", "backbone.vram=8"]
        eta = ["method.eta=1.0"] if method == "trace" else []
        settings = [*held, *eta, "protocol.size=16", "protocol.steps=3", *SHORT.get(method, [])]
        plan = resolve(build(flags, overrides=settings), registries)
        backbone = plan.backbone.load(plan.backbone_config)
        backbone.expect(
            lambda plan=plan, loaded=backbone: plan.method(plan.method_config).texts(context(plan, loaded, registries))
        )
        seen, logged = watched(backbone.denoiser), []
        erasure = compute(plan, backbone, registries, log=lambda step, total, values, to=logged: to.append(dict(values)))
        assert max(seen[False], default=0) <= ROWS
        assert max(seen[True], default=0) <= plan.method(plan.method_config).footprint(plan).rows
        assert all(torch.isfinite(to_dense(delta)).all() for delta in erasure.total().values())
        losses[dtype] = logged
    for fine, coarse in zip(*losses.values(), strict=True):
        assert coarse == {name: pytest.approx(value, rel=RELATIVE, abs=FLOOR) for name, value in fine.items()}
