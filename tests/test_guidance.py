"""Erasures that act while images are drawn: the pipeline's own negative prompt, SLD's formula, and nothing left behind."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from erasekit.concepts import Concept
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.hooks import detach
from erasekit.erasures.loading import load_into as load_with
from erasekit.erasures.modelcard import load_lines, model_card
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.methods.context import RunContext
from erasekit.registration.plugins import default
from erasekit.testing import tiny, tiny_flux, tiny_flux2, tiny_sd3
from erasekit_negative_prompt.method import NegativePrompt, NegativePromptConfig
from erasekit_sld.method import MAX, MEDIUM, Sld, SldConfig

PROMPTS = ["a photo of a cat", "a dog"]
SCALE = 3.0


@pytest.fixture(scope="module", params=["sd", "sd3", "flux", "flux-cfg", "flux2", "flux2-base"])
def backbone(request, tiny_folder, tiny_sd3_folder, tiny_flux_folder):
    if request.param == "sd":
        return tiny.load(tiny_folder)
    if request.param == "sd3":
        return tiny_sd3.load(tiny_sd3_folder)
    if request.param.startswith("flux2"):
        folder = request.getfixturevalue(f"tiny_{request.param.replace('-', '_')}_folder")
        return tiny_flux2.load(folder, distilled=request.param == "flux2")
    return tiny_flux.load(tiny_flux_folder, guidance="embedded" if request.param == "flux" else "cfg")


load_into = partial(load_with, component=default().components.get)


def made(backbone, method, config, folder, concepts=("cat:kitten",)):
    """An erasure on disk."""
    ctx = RunContext(backbone=backbone, concepts=tuple(Concept.parse(c) for c in concepts), task=None)
    method(config).erase(ctx).save(folder)
    return folder


def draw(backbone, pipe, steps=4, guidance=SCALE, **arguments):
    """Latents of `PROMPTS` after the last step, as the denoiser takes them."""
    seen = []
    call = {"callback_on_step_end": lambda p, i, t, tensors: seen.append(tensors["latents"]) or tensors}
    call |= backbone.call_arguments(backbone.encode(PROMPTS), empty=backbone.encode([""]), guidance=guidance) | arguments
    size = dict.fromkeys(("height", "width"), 16)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    pipe(**call, **size, num_inference_steps=steps, generator=generators, output_type="latent")
    return seen[-1] if seen else None


def negative(backbone, pipe, text, scale):
    """The arguments of a plain pipeline with a negative prompt; FLUX.2's takes one if it is not said to be distilled."""
    cond = backbone.encode([text] * len(PROMPTS))
    arguments = {"negative_prompt_embeds": cond.tokens}
    if pipe.config.get("is_distilled"):
        pipe.register_to_config(is_distilled=False)
        return arguments | {"guidance_scale": scale}
    if cond.pooled is not None and backbone.prefix == "transformer":
        arguments["negative_pooled_prompt_embeds"] = cond.pooled
    if backbone.embedded_guidance:
        arguments["true_cfg_scale"] = scale
    return arguments


def test_the_negative_prompt_is_the_pipelines_own(backbone, tmp_path):
    folder = made(backbone, NegativePrompt, NegativePromptConfig(scale=2.5), tmp_path / "e")
    pipe = backbone.pipeline()
    load_into(pipe, folder, base=backbone)
    other = backbone.pipeline()
    plain = draw(backbone, other, **negative(backbone, other, "cat, kitten", 2.5))
    torch.testing.assert_close(draw(backbone, pipe), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, draw(backbone, backbone.pipeline()), rtol=1e-2, atol=1e-2)


def sld_by_hand(backbone, text, strength, steps=4):
    """Safe Latent Diffusion in a loop of its own; the combination in float64."""
    pipe = backbone.pipeline()
    cond, none, safety = (backbone.encode(p) for p in (PROMPTS, ["", ""], [text] * 2))
    schedule, x, nu = backbone.schedule(steps, 16), backbone.latents([1, 2], 16), 0.0
    if backbone.prefix == "unet":
        pipe.scheduler.set_timesteps(steps)
        schedule.timesteps[:] = pipe.scheduler.timesteps
        schedule.tau[:] = 1 - (pipe.scheduler.timesteps.double() + 1) / 1000
    for k in range(steps):
        tau = schedule.tau[k].expand(2)
        with torch.no_grad():
            e0, ec, es = (backbone.predict(x, tau, c, guidance=SCALE).double() for c in (none, cond, safety))
        phi = strength["safety_scale"] * (ec - es)
        mu = phi.abs().clamp(max=1) * ((ec - es) < strength["threshold"])
        gamma = mu * (es - e0) + strength["momentum_scale"] * nu
        nu = strength["momentum"] * nu + (1 - strength["momentum"]) * gamma
        if schedule.tau[k] < strength["warmup"]:
            gamma = 0 * gamma
        scale = 1.0 if backbone.embedded_guidance else SCALE
        e = (e0 + scale * (ec - e0 - gamma)).float()
        if backbone.prefix == "unet":
            x = pipe.scheduler.step(e, pipe.scheduler.timesteps[k], x).prev_sample
        else:
            x = backbone.step(e, x, k, schedule)
    return x


@pytest.mark.parametrize("preset", [MEDIUM, MAX, MAX | {"warmup": 0.3}])
def test_sld_is_its_formula(backbone, tmp_path, preset):
    folder = made(backbone, Sld, SldConfig(**preset), tmp_path / "e")
    pipe = backbone.pipeline()
    load_into(pipe, folder, base=backbone)
    wanted = sld_by_hand(backbone, "cat, kitten", preset)
    torch.testing.assert_close(draw(backbone, pipe), wanted, rtol=1e-3, atol=1e-3)
    again = draw(backbone, pipe)
    assert torch.equal(again, draw(backbone, pipe)), "the momentum of one image reaches the next"
    assert not torch.allclose(again, draw(backbone, backbone.pipeline()), rtol=1e-2, atol=1e-2)


def test_the_warm_up_is_early(backbone, tmp_path):
    """Latents before the end of the warm-up are the base's."""
    folder = made(backbone, Sld, SldConfig(**MAX | {"warmup": 0.5}), tmp_path / "e")
    pipe, seen = backbone.pipeline(), {}
    load_into(pipe, folder, base=backbone)
    for name, drawn in (("base", backbone.pipeline()), ("sld", pipe)):
        latents = seen[name] = []

        def record(pipe, index, timestep, tensors, latents=latents):
            latents.append((1 - float(timestep) / 1000, tensors["latents"].clone()))
            return tensors

        draw(backbone, drawn, steps=8, callback_on_step_end=record)
    same = [torch.allclose(a, b, rtol=1e-4, atol=1e-4) for (_, a), (_, b) in zip(seen["base"], seen["sld"], strict=True)]
    early = [tau < 0.5 - 2e-3 for tau, _ in seen["base"]]
    assert same == early
    assert 0 < sum(early) < 8


def test_without_it_the_pipeline_is_the_bases(backbone, tmp_path):
    pipe = backbone.pipeline()
    plain = draw(backbone, pipe)
    load_into(pipe, made(backbone, Sld, SldConfig(**MAX), tmp_path / "e"), base=backbone)
    assert not torch.equal(draw(backbone, pipe), plain)
    load_into(
        pipe,
        made(backbone, NegativePrompt, NegativePromptConfig(), tmp_path / "f"),
        base=backbone,
        component=default().components.get,
    )  # takes its place
    detach(pipe)
    assert torch.equal(draw(backbone, pipe), plain)


def test_the_files_are_whole_and_belong_to_a_base(backbone, tmp_path, tiny_folder, tiny_flux_folder):
    folder = made(backbone, Sld, SldConfig(threshold=0.5), tmp_path / "e")
    read = Erasure.load(folder, backbone)
    assert read.kind == "guidance"
    assert read.deltas == {}
    assert read.guidance.texts == ("", "cat, kitten")
    assert read.guidance.settings["threshold"] == 0.5
    assert torch.equal(read.guidance.prompts.tokens, backbone.encode(["", "cat, kitten"]).tokens)
    again = made(backbone, Sld, SldConfig(threshold=0.5), tmp_path / "f")
    assert all((folder / n).read_bytes() == (again / n).read_bytes() for n in ("guidance.json", "guidance.safetensors"))
    other = tiny_flux.load(tiny_flux_folder) if backbone.prefix == "unet" else tiny.load(tiny_folder)
    with pytest.raises(UsageError, match="made for another base"):
        load_into(other.pipeline(), folder, base=other)
    with pytest.raises(UsageError, match="Load it whole"):
        load_into(backbone.pipeline(), folder, ["cat"], base=backbone)
    (folder / "guidance.json").write_text((folder / "guidance.json").read_text().replace("0.5", "0.6"))
    with pytest.raises(EnvironmentProblem, match="damaged"):
        load_into(backbone.pipeline(), folder, base=backbone)


def test_a_text_that_is_refused_elsewhere_is_refused_here(tiny_folder, tmp_path):
    with pytest.raises(UsageError, match="Prompt 1 "):
        made(tiny.load(tiny_folder), Sld, SldConfig(text="nsfw picture of a child"), tmp_path / "e")


def test_guidance_that_is_off_cannot_be_steered(tiny_folder, tmp_path):
    backbone = tiny.load(tiny_folder)
    pipe = backbone.pipeline()
    load_into(
        pipe,
        made(backbone, NegativePrompt, NegativePromptConfig(), tmp_path / "e"),
        base=backbone,
        component=default().components.get,
    )
    with pytest.raises(UsageError, match="guidance scale above 1"):
        draw(backbone, pipe, guidance=1.0)


def test_the_card_says_that_it_is_removable(tiny_folder, tmp_path):
    folder = made(tiny.load(tiny_folder), NegativePrompt, NegativePromptConfig(text="a dog"), tmp_path / "e")
    record = json.loads((folder / "erasure.json").read_text())
    assert record["kind"] == "guidance"
    assert "No weight is changed" in model_card(record)
    assert 'load(pipe, "here")' in load_lines(record, "here")
    assert "load_lora_weights" not in model_card(record)


def test_run_verify_and_generate_take_it(erasekit, tmp_path):
    """From the command line: the report says what it is, and there is no certificate of weights."""
    base = ["--backbone", "sd15-mini", "--task", "objects"]
    done = erasekit("run", "--method", "negative-prompt", *base, "--concept", "cat", "--limit", 2, "--json")
    assert done.returncode == 0, done.stderr
    folder = next(tmp_path.glob("runs/sd15-mini/objects/negative-prompt/*/report.html")).parent
    assert "No weight is changed" in (folder / "report.html").read_text()
    assert not (folder / "certificate.json").exists()
    done = erasekit("verify", folder / "erasure")
    assert done.returncode == 0, done.stderr
    assert "changes no weights" in done.stdout
    done = erasekit("generate", "a photo of a cat", "--erasure", folder / "erasure", "--out", "steered")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "steered").iterdir())) == 1


FOREIGN = """
import erasekit
from erasekit.erasures.guidance import Guidance
from erasekit.registration.plugins import default


class Nothing:
    def __init__(self, settings):
        pass

    def __call__(self, step):
        concept, none = step.predict("concept", "none")
        return none, none


class Blank(erasekit.Method):
    name = "blank"

    def erase(self, ctx):
        guidance = Guidance.away_from(ctx.backbone, ctx.concepts, "", scheme="blank", settings={})
        return self.erasure(ctx, guidance=guidance)


@erasekit.hookimpl
def register_methods(register):
    register("blank", Blank)


@erasekit.hookimpl
def register_components(register):
    register("guidance", "blank", Nothing)
"""


def test_a_scheme_of_a_plugin_file_is_found(erasekit, tmp_path, world, tiny_folder):
    """It is registered for this command only, and has to be there when the erasure is loaded again."""
    (tmp_path / "mine.py").write_text(FOREIGN)
    tiny_base = ["--backbone", "tiny", "-s", f"backbone.path={tiny_folder}", "--plugin", world, "--plugin", "mine.py"]
    done = erasekit("run", "--method", "blank", *tiny_base, "--task", "words", "--concept", "cat", "--limit", 1)
    assert done.returncode == 0, done.stderr
    folder = next(tmp_path.glob("runs/tiny/words/blank/*/report.html")).parent
    done = erasekit("generate", "a cat", *tiny_base, "--erasure", folder / "erasure", "--out", "steered")
    assert done.returncode == 0, done.stderr
    done = erasekit("generate", "a cat", *tiny_base[:-2], "--erasure", folder / "erasure", "--out", "without")
    assert done.returncode == 2
    assert (
        "steers sampling by the scheme 'blank', which no installed plugin has. Install the plugin that made it" in done.stderr
    )
