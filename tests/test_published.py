"""Defaults of real models are the published settings, those of the minis stay; a step at an official preset is the paper's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from erasekit.backbones.attention import attention_maps
from erasekit.backbones.protocol import concatenate
from erasekit.backbones.schedule import is_late
from erasekit.erasures.deltas import merged
from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit.methods.students import masked
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit_ant.method import Ant, AntConfig
from erasekit_eraseanything import losses as terms
from erasekit_eraseanything.method import EraseAnything, EraseAnythingConfig
from erasekit_esd.method import Esd, EsdConfig
from erasekit_mace import masks
from erasekit_mace.losses import sample_tau
from erasekit_mace.method import Mace, MaceConfig
from erasekit_mace.templates import STYLES, THINGS
from tests.third_party.tiny_world import Words

MINIS = json.loads((Path(__file__).parent / "mini_settings.json").read_text())  # as they were when they were chosen
CONSTANT = {"schedule": "constant", "warmup": 0, "batch": 1}
ESD = CONSTANT | {"eta": 1.0, "anchor": "empty", "clip": 0.0}
MEDIUM = {"safety_scale": 1000.0, "threshold": 0.01, "warmup": 0.2, "momentum_scale": 0.3, "momentum": 0.4}
UCE = {"tokens": "last", "bare": True, "guides": [], "ridge": 0.5, "ridge_unit": "absolute", "erase_scale": 1.0}
RECE = {"guides": [], "ridge_unit": "absolute", "adversary_ridge": 0.1, "round_ridge": 0.1, "rounds": 1, "hold": False}
MACE = CONSTANT | {"lr": 1e-4, "steps": 50, "clip": 1.0, "weight_decay": 0.01, "init": "gaussian", "images": 8}
SPEED = {"layers": "v", "tokens": "last", "bare": True, "threshold": 0.1, "threshold_unit": "absolute", "scale": 1.0}
SPEED |= {"lamb": 0.0, "centres": 3, "augment": 10, "filter": True}
GEM = {"schedule": "constant", "warmup": 0, "lr": 1e-3, "rank": 16, "eta": 1.0, "gamma": 100.0, "weight_decay": 0.01}
GEM |= {"steps": 25, "batch": 10, "share": 0.36, "guidance": 3.0, "clip": 0.0, "init": "uniform"}
ERASEFLOW = CONSTANT | {"steps": 20, "lr": 3e-4, "clip": 1.0, "weight_decay": 0.01, "init": "gaussian", "rank": 4}
ERASEFLOW |= {"alpha": None, "fresh": True, "eta": 1.0, "last": 0.2, "others": 0.25, "log_beta": 2.5, "guidance": 5.0}
ERASEFLOW_FLUX = {"steps": 40, "clip": 0.0, "weight_decay": 1e-4, "rank": 32, "alpha": 64.0, "others": 1.0, "log_beta": 1000.0}
SPM = {"schedule": "cosine", "warmup": 500, "steps": 3000, "lr": 1e-4, "weight_decay": 0.01, "clip": 0.0, "init": "uniform"}
SPM |= {"rank": 1, "alpha": None, "bare": True, "anchor": "empty", "eta": 1.0, "anchoring": 1000.0, "anchors": 4, "batch": 1}
SPM |= {"guidance": 3.0, "scope": "blocks"}
# At a negative guidance of 2 STEREO's loops aim at f(w) - (2 - 1) (f(w) - f(0)), which is f(0); the last erasing at +1 and -3.
STEREO = CONSTANT | {"loops": 2, "steps": 200, "eta": 0.0, "keep": 1.0, "push": 3.0, "anchor": "empty", "weight_decay": 0.01}
STEREO |= {"word_steps": 3000, "word_lr": 5e-3, "guidance": 3.0, "clip": 0.0}
ADVUNLEARN = CONSTANT | {"steps": 1000, "kept_batch": 5, "retain": 0.3, "eta": 1.0, "anchor": "empty", "plain_steps": 200}
ADVUNLEARN |= {"attack_steps": 30, "attack_lr": 1e-3, "tokens": 1, "guidance": 3.0, "clip": 0.0, "weight_decay": 0.0}
PUBLISHED = {
    ("esd", "sd"): ESD | {"lr": 5e-5, "steps": 200, "weights": "full", "variant": "auto", "guidance": 3.0, "told": None},
    ("esd", "flux"): ESD | {"lr": 1e-4, "steps": 1400, "weights": "lora", "variant": "x", "told": 1.0},
    ("mace", "sd"): MACE | {"scope": "kv", "window": [0.6, 0.8], "ridge": 0.0, "fuse_preserve": 1e-4, "templates": "thirty"},
    ("mace", "flux"): MACE | {"scope": "add_kv", "ridge_unit": "relative"},
    ("ant", "sd"): CONSTANT | {"form": "single", "lr": 5e-4, "steps": 250, "tau0": 0.14, "early_weight": 1.0, "clip": 0.0},
    ("ant", "flux"): CONSTANT | {"form": "multi", "scope": "add_kv", "lr": 5e-4, "tau0": 0.04},
    ("eraseanything", "flux"): CONSTANT | {"lr": 1e-3, "rank": 8, "scope": "add_qk", "init": "gaussian", "told": 3.0},
    ("eraseanything", "sd"): CONSTANT | {"lr": 1e-3, "rank": 8, "scope": "kv", "attention": 0.001, "contrast": 0.1},
    ("uce", "sd"): UCE,
    ("uce", "flux"): UCE,
    ("rece", "sd"): RECE | {"ridge": 0.5, "round_preserve_scale": 0.1, "bare": True},
    ("rece", "flux"): {"ridge_unit": "relative", "hold": True},
    ("sld", "sd"): MEDIUM,
    ("sld", "flux"): MEDIUM,
    ("negative-prompt", "flux"): {"scale": 2.0},
    ("speed", "sd"): SPEED,
    ("speed", "flux"): SPEED,
    ("gem", "flux"): GEM | {"scope": "qk_dual"},
    ("gem", "sd"): GEM | {"scope": "kv"},
    ("eraseflow", "sd"): ERASEFLOW | {"scope": "attention"},
    ("eraseflow", "flux"): ERASEFLOW | ERASEFLOW_FLUX | {"scope": "all_attn", "eta": 0.495},
    ("spm", "sd"): SPM,
    ("spm", "flux"): SPM,
    ("stereo", "sd"): STEREO | {"lr": 2e-5, "search_lr": 5e-6, "weights": "full", "scope": "no-text"},
    ("stereo", "flux"): STEREO | {"lr": 1e-4, "search_lr": 1e-4, "weights": "lora", "scope": "qk_dual"},
    ("advunlearn", "sd"): ADVUNLEARN | {"lr": 1e-5, "weights": "full", "scope": "kv"},
    ("advunlearn", "flux"): ADVUNLEARN | {"lr": 1e-4, "weights": "lora", "scope": "qk_dual"},
}


def settings_of(method, backbone, **flags):
    """What a run would have, as JSON holds it."""
    concepts = () if backbone.endswith("mini") else ("a cat",)
    plan = resolve(build({"method": method, "backbone": backbone, "concepts": concepts, **flags}), default())
    return plan.method_config.model_dump(mode="json")


@pytest.mark.parametrize("name", MINIS)
def test_the_minis_have_what_was_chosen_on_them(name):
    backbone, method = name.split("/")
    assert settings_of(method, backbone) == MINIS[name]


@pytest.mark.parametrize("which", PUBLISHED, ids="-".join)
def test_real_models_have_the_published_settings(which):
    method, family = which
    for backbone in {"sd": ("sd14", "sd15"), "flux": ("flux", "flux-schnell")}[family]:
        found = settings_of(method, backbone)
        assert {name: found[name] for name in PUBLISHED[which]} == PUBLISHED[which]


ONES = ("esd", "mace", "ant", "eraseanything", "uce", "rece", "speed", "gem", "stereo", "advunlearn", "spm", "eraseflow")
OFFICIAL = [(m, p) for m in ONES for p in default().methods.get(m).presets]


@pytest.mark.parametrize(("method", "preset"), OFFICIAL)
def test_a_preset_is_the_same_on_every_model_but_for_its_layers(method, preset):
    """What was chosen on a mini does not shine through."""
    found = [settings_of(method, b, preset=preset) for b in ("sd15", "sd15-mini", "flux", "flux-mini")]
    for settings in found:
        for key in ("scope", "weights") if method == "advunlearn" else ("scope",):
            settings.pop(key, None)
    if preset != "flux":
        assert found[0] == found[1]
        assert found[2] == found[3]
    assert found[0] == found[2] or method in ("ant", "advunlearn")
    assert found[0].get("schedule", "constant") == ("cosine" if method == "spm" else "constant")


@pytest.mark.parametrize("setting", ["esd guidance", "ant alpha", "mace captions", "eraseanything told"])
def test_what_may_be_left_open_can_be_from_the_command_line(setting):
    method, key = setting.split()
    config = build({"method": method, "backbone": "sd15", "concepts": ("a cat",)}, overrides=[f"method.{key}=none"])
    assert getattr(resolve(config, default()).method_config, key) is None


def test_thirty_sentences_are_thirty_of_ours():
    for sentences in (THINGS, STYLES):
        assert len(set(sentences)) == 30
        assert all(sentence.count("{}") == 1 for sentence in sentences)


# One step


def context(backbone, **changes):
    concept = Words().concept("cat").model_copy(update={"phrases": ("a cat",), "templates": ("a photo of {}",)} | changes)
    component = lambda slot, name: getattr(masks, name)  # noqa: E731
    return RunContext(backbone, (concept,), Words(), 0, component=component)


def official(method, config, preset="official", **small):
    return method(config(**method.presets[preset] | small))


def perturbed(parameters, std=0.02):
    """Away from the start, where a student is its teacher."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in parameters:
            p.add_(std * torch.randn(p.shape, generator=generator))


def f64(tensor):
    return tensor.detach().double().numpy()


def check(parts, parameters, value, outputs, slopes):
    """A step's loss is `value`, and its gradient the one that the slopes at the outputs give, both computed in float64."""
    total = sum(parts.values())
    assert total.item() == pytest.approx(value, rel=1e-4)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    slopes = [torch.from_numpy(np.asarray(s)).to(o) for o, s in zip(outputs, slopes, strict=True)]
    wanted = torch.autograd.grad(outputs, parameters, slopes, allow_unused=True)
    scale = max(float(w.abs().max()) for w in wanted if w is not None)
    assert scale > 0
    for mine, theirs in zip(found, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("preset", ["official", "paper", "flux"])
def test_a_step_of_esd(backbone, preset):
    ctx = context(backbone)
    method = official(Esd, EsdConfig, preset, trajectories=2, variant="x", rank=2)
    pool = method.pool(ctx, ctx.concepts[0])
    points = pool.sample(1, ctx.generator("draw"))
    scale = {"flux": 1.0}.get(preset, ctx.protocol.guidance)  # what a model with embedded guidance is told
    base = RunContext(backbone, ctx.concepts, ctx.task, protocol=ctx.protocol.model_copy(update={"guidance": scale}))
    with torch.no_grad():
        empty, concept = (f64(base.predict(points.x, points.tau, c)) for c in (backbone.encode([""]), points.cond))
    with method.student(ctx) as student:
        perturbed(student.parameters)
        parts = method.losses(student, [pool])(0, ctx.generator("draw"))
        output = base.predict if method.config.weights == "lora" else student.predict
        output = output(points.x, points.tau, points.cond)
        gap = f64(output) - (empty - 1.0 * (concept - empty))
        check(parts, list(student.parameters), (gap**2).mean(), [output], [2 * gap / gap.size])


def test_trajectories_of_esd_keep_the_samplers_scale_when_the_model_is_told_another(flux):
    ctx = context(flux)
    pools = [official(Esd, EsdConfig, "flux", trajectories=2, told=told).pool(ctx, ctx.concepts[0]) for told in (1.0, None)]
    torch.testing.assert_close(pools[0].x, pools[1].x, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pools[0].predictions, pools[1].predictions)


def ant_by_hand(ctx, method, pool, predict, base):
    """Value, outputs and slopes of L_late + a2 U_late + a1 (L_early + a2 U_early) at guidance `composed`."""
    config, generator, value, outputs, slopes = method.config, ctx.generator("draw"), 0.0, [], []
    nothing, s = ctx.backbone.encode([""]), config.composed
    late = is_late(pool.tau, config.tau0)
    for mask, sign, weight in ((late, -1, 1.0), (~late, 1, config.early_weight)):
        points = pool.at(mask).sample(config.batch, generator)
        cond = concatenate([points.cond, nothing.repeat(config.batch)])
        at = torch.cat([points.x] * 2), torch.cat([points.tau] * 2), cond
        output = predict(*at)
        concept, empty = np.split(f64(output), 2)
        base_concept, base_empty = np.split(f64(base(*at)), 2)
        gap = empty + s * (concept - empty) - (base_empty + sign * s * (base_concept - base_empty))
        held, n = empty - base_empty, gap.size
        a2 = config.unconditional_weight
        value += weight * ((gap**2).mean() + a2 * (held**2).mean())
        outputs.append(output)
        slopes.append(weight * 2 / n * np.concatenate([s * gap, (1 - s) * gap + a2 * held]))
    return value, outputs, slopes


def test_a_step_of_ant_single(backbone):
    ctx = context(backbone)
    method = official(Ant, AntConfig, trajectories=2)
    pool, student = method.pool(ctx, ctx.concepts[0]), masked(ctx, backbone.lora_targets("all"), {})
    perturbed(student.parameters)
    parts = method.losses(student.predict, [pool], backbone.encode([""]))(0, ctx.generator("draw"))
    assert (method.config.early_weight, method.config.unconditional_weight, method.config.composed) == (1.0, 0.5, 1.0)
    check(parts, student.parameters, *ant_by_hand(ctx, method, pool, student.predict, ctx.predict))


def test_a_step_of_ant_multi(backbone):
    """The published code's weights, with predictions at guidance 7.5 and a LoRA of which 1/64 B A counts."""
    ctx = context(backbone)
    method = official(Ant, AntConfig, "official-multi", trajectories=2)
    config, pool = method.config, method.pool(ctx, ctx.concepts[0])
    assert (config.early_weight, config.unconditional_weight, config.composed) == (0.5, 2.5, 7.5)
    assert (config.rank, config.alpha, config.lora_scale, config.fusion_preserve) == (64, 1.0, 4.3, 2e-12 * 1e13)
    with AdapterBank(backbone) as bank:
        layers = backbone.lora_targets(config.scope)
        bank.add("cat", layers, config.rank, ctx.generator("init"), init=config.init, alpha=config.alpha)
        parameters = bank.train_only("cat")
        perturbed(parameters, std=0.2)
        parts = method.losses(ctx.predict, [pool], backbone.encode([""]))(0, ctx.generator("draw"))

        def base(*at):
            with bank.teacher(), torch.no_grad():
                return ctx.predict(*at)

        check(parts, parameters, *ant_by_hand(ctx, method, pool, ctx.predict, base))
        x, tau, cond = pool.x[:1], pool.tau[:1], pool.cond[pool.row[:1]]
        named = dict(backbone.denoiser.named_parameters())
        factors = {layer: [named[f"{layer}.lora_{side}.bank_0.weight"].detach().clone() for side in "BA"] for layer in layers}
        weights = {layer: (b.double() @ a.double() / 64).float() for layer, (b, a) in factors.items()}
        with torch.no_grad():
            student = ctx.predict(x, tau, cond)
        deltas = bank.deltas("cat")
    for layer, weight in weights.items():
        torch.testing.assert_close(deltas[layer].up @ deltas[layer].down, weight, rtol=1e-4, atol=1e-6)
    with merged(backbone.denoiser, deltas), torch.no_grad():
        torch.testing.assert_close(ctx.predict(x, tau, cond), student, rtol=1e-3, atol=1e-4)


def test_official_ant_keeps_the_loras_on_keys_and_values(backbone):
    ctx = context(backbone)
    method = official(Ant, AntConfig, "official-multi", trajectories=2, steps=1, rank=2)
    scope = {"unet": "kv", "dit": "add_kv"}[backbone.capabilities.family]
    assert list(method.lora(ctx, 0, method.pool(ctx, ctx.concepts[0]))) == backbone.lora_targets(scope)


@pytest.mark.parametrize("preset", ["official", "official-object", "official-explicit"])
def test_a_step_of_mace(backbone, preset):
    ctx = context(backbone)
    scope = {"unet": "kv", "dit": "add_kv"}[backbone.capabilities.family]
    method = official(Mace, MaceConfig, preset, scope=scope, images=2)
    drawn = method.images(ctx, ctx.concepts[0])
    with AdapterBank(backbone) as bank:
        bank.add("cat", backbone.lora_targets(scope), 1, ctx.generator("init"), init="gaussian")
        parameters = bank.train_only("cat")
        perturbed(parameters)
        parts, generator = method.losses(ctx, drawn)(0, ctx.generator("draw")), ctx.generator("draw")
        index = torch.randint(len(drawn.x0), (1,), generator=generator)
        tau = sample_tau(method.config.window, 1, generator)
        noise = torch.randn(drawn.x0[index].shape, generator=generator)
        with attention_maps(backbone.denoiser) as maps:
            ctx.predict(backbone.add_noise(drawn.x0[index], noise, tau), tau, drawn.cond[index])
        value, outputs, slopes = 0.0, list(maps.values()), []
        for output in outputs:
            side = round(output.shape[2] ** 0.5)
            mask = f64(torch.nn.functional.adaptive_avg_pool2d(drawn.masks[index], side)).reshape(1, 1, -1, 1)
            seen = f64(output) * mask * f64(drawn.tokens[index])[:, None, None]
            value += (seen**2).sum()
            slopes.append(2 * seen * mask)
        check(parts, parameters, value, outputs, slopes)


def test_the_window_of_explicit_content_is_uniform():
    tau = sample_tau(Mace.presets["official-explicit"]["window"], 20_000, torch.Generator().manual_seed(0))
    assert torch.histc(tau.float(), 10, 0, 1).min() > 0.9 * 2000


def contrast_by_hand(near, far, temperature=0.07):
    """-log of the share of the near ones."""
    e = [np.exp(np.array(group) / temperature) for group in (near, far)]
    return -np.log(e[0].sum() / (e[0].sum() + e[1].sum()))


def test_a_step_of_eraseanything(backbone):
    ctx = context(backbone)
    scope = {"unet": "kv", "dit": "add_qk"}[backbone.capabilities.family]
    method = official(EraseAnything, EraseAnythingConfig, scope=scope, images=2, kept_images=2, shuffle=0.0, swap=0.0)
    with method.student(ctx) as (bank, step, parameters):
        perturbed(parameters)
        own, generator = step.materials[0], ctx.generator("draw")
        told = ctx.protocol.model_copy(update={"guidance": 3.0})
        now = RunContext(backbone, ctx.concepts, ctx.task, protocol=told)
        image = torch.randint(2, (1,), generator=generator)
        row = image * own.versions + torch.randint(own.versions, image.shape, generator=generator)
        tau = torch.rand(1, generator=generator)
        x = backbone.add_noise(own.x0[image], torch.randn(own.x0[image].shape, generator=generator), tau)
        with torch.no_grad(), bank.teacher():
            concept, neutral = (f64(now.predict(x, tau, c)) for c in (own.wordings[row].cond, own.neutral[row]))
        with attention_maps(backbone.denoiser) as maps:
            output = now.predict(x, tau, own.wordings[row].cond)
        last = list(maps.values())[-1]
        gap, columns = f64(output) - (neutral - (concept - neutral)), f64(own.wordings[row].tokens)[:, None]
        sizes = np.sqrt((f64(last) ** 2).sum(1))
        value = (gap**2).mean() + 0.001 * (sizes * columns).sum()
        slope = 0.001 * f64(last) / sizes[:, None] * columns[:, None]
        check(step(0, ctx.generator("draw")), parameters, value, [output, last], [2 * gap / gap.size, slope])


def test_the_upper_level_of_eraseanything(backbone):
    ctx = context(backbone)
    scope = {"unet": "kv", "dit": "add_qk"}[backbone.capabilities.family]
    method = official(EraseAnything, EraseAnythingConfig, scope=scope, images=2, kept_images=2)
    with method.student(ctx) as (bank, step, parameters):
        perturbed(parameters)
        own, seen = step.materials[0], []

        def feature(x, tau, word):
            with attention_maps(backbone.denoiser) as maps:
                step.ctx.predict(x, tau, word.cond)
            seen.append(terms.feature(list(maps.values())[-1:], word.tokens))
            return seen[-1]

        step._feature = feature
        parts = step(1, ctx.generator("draw"))
        *others, itself, synonym, anchor = map(f64, seen)
        value = 0.1 * contrast_by_hand([anchor[0] @ o[0] for o in others], [anchor[0] @ o[0] for o in (itself, synonym)])
        assert len(others) == 3
        assert own.synonyms
        assert parts["contrast"].item() == pytest.approx(value, rel=1e-4)
        generator = ctx.generator("draw")
        image = torch.randint(2, (1,), generator=generator)
        tau = torch.rand(1, generator=generator)
        x0 = step.kept_x0[image]
        at = backbone.add_noise(x0, torch.randn(x0.shape, generator=generator), tau), tau, step.kept_cond[image]
        with torch.no_grad(), bank.teacher():
            target = f64(step.ctx.predict(*at))
        output = step.ctx.predict(*at)
        gap = f64(output) - target
        check({"preserve": parts["preserve"]}, parameters, 0.1 * (gap**2).mean(), [output], [0.2 * gap / gap.size])
