"""The SD3.5 backbone against diffusers itself, a prompt that is read twice, and erasures from it."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch.utils.flop_counter import FlopCounterMode

from erasekit.backbones.alignment import align
from erasekit.backbones.held import of_diffusers
from erasekit.backbones.protocol import Backbone, guided
from erasekit.backbones.sd3 import StableDiffusion35Large, StableDiffusion35Medium
from erasekit.cli import main
from erasekit.concepts import Concept
from erasekit.erasures.certificate import PER_POSITION, certificate
from erasekit.erasures.deltas import LowRank, merged, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into, unload
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.methods import closedform
from erasekit.methods.context import RunContext
from erasekit.methods.sites import last_words, pair_rows
from erasekit.registration import plugins
from erasekit.runs.compute import compute, context
from erasekit.runs.config import build
from erasekit.runs.exporting import export
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from erasekit.testing import check_attack, check_backbone, tiny, tiny_flux, tiny_sd3
from erasekit_negative_prompt.method import NegativePrompt, NegativePromptConfig
from erasekit_uce.method import Uce, UceConfig
from tests.conftest import THIRD_PARTY
from tests.contracts.test_attacks import SHORT as ATTACKS
from tests.fake_memory import sd3_call
from tests.test_rows import METHODS, ROWS, SHORT, SMALL, TIGHT, watched
from tests.third_party.tiny_world import Words

PROMPTS = ["a photo of a cat", "a dog by vint"]
CLIP, T5 = tiny.LENGTH, tiny_flux.POSITIONS


@pytest.fixture(scope="module")
def backbone(tiny_sd3_folder):
    return tiny_sd3.load(tiny_sd3_folder)


def plain(folder, dtype=torch.float32):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompts, *, scale, steps=4, kind="latent", seeds=(7, 8), **more):
    """What the plain pipeline draws from text."""
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    how = {"num_inference_steps": steps, "guidance_scale": scale, "max_sequence_length": T5, "output_type": kind}
    return pipe(prompts, generator=generator, **how, **more).images


@torch.no_grad()
def sampled(backbone, prompts, *, scale, steps=4, seeds=(7, 8)):
    """Latents of the adapter's own loop."""
    schedule, cond, empty = backbone.schedule(steps), backbone.encode(prompts), backbone.encode([""])
    x = backbone.latents(seeds)
    for k in range(steps):
        tau = schedule.tau[k].expand(len(x))
        x = backbone.step(guided(backbone, x, tau, cond, uncond=empty, scale=scale), x, k, schedule)
    return x


def test_it_is_a_backbone(backbone):
    assert isinstance(backbone, Backbone)
    assert backbone.capabilities.names() == {"dit", "velocity", "cfg", "bidirectional"}
    assert not backbone.embedded_guidance


def test_the_contract_is_kept_in_bf16(tiny_sd3_folder):
    check_backbone("sd35-medium", settings={"path": str(tiny_sd3_folder), "dtype": "bfloat16"}, size=16)


@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-5), ("bfloat16", 0.05)])
def test_sampling_is_the_pipelines_own(tiny_sd3_folder, dtype, near):
    backbone, pipe = tiny_sd3.load(tiny_sd3_folder, dtype=dtype), plain(tiny_sd3_folder, getattr(torch, dtype))
    mine, theirs = sampled(backbone, PROMPTS, scale=4.0), drawn(pipe, PROMPTS, scale=4.0)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=near)
    assert not torch.allclose(theirs, drawn(pipe, PROMPTS, scale=3.0), rtol=0, atol=2 * near)


def test_other_sizes_are_the_pipelines_too(backbone, tiny_sd3_folder):
    size = {"height": 24, "width": 24}
    theirs = drawn(plain(tiny_sd3_folder), PROMPTS[:1], scale=1.0, steps=1, seeds=(7,), **size)
    x, tau = backbone.latents([7], 24), backbone.schedule(1, 24).tau
    with torch.no_grad():
        mine = backbone.step(backbone.predict(x, tau, backbone.encode(PROMPTS[:1])), x, 0, backbone.schedule(1, 24))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def test_the_steps_are_the_pipelines(backbone):
    """The scheduler shifts twice: its own table, and the steps between the ends of that."""
    least = 3 * 1e-3 / (1 + 2 * 1e-3)
    s = np.linspace(1.0, least, 5)
    np.testing.assert_allclose(1 - backbone.schedule(5).tau.numpy(), 3 * s / (1 + 2 * s), atol=1e-6)


def test_encoded_prompts_give_the_pipeline_the_same_images(backbone, tiny_sd3_folder):
    pipe = plain(tiny_sd3_folder)
    theirs = drawn(pipe, PROMPTS, scale=4.0, kind="np")
    arguments = backbone.call_arguments(backbone.encode(PROMPTS), empty=backbone.encode([""]), guidance=4.0)
    generator = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    found = pipe(**arguments, num_inference_steps=4, generator=generator, output_type="np").images
    np.testing.assert_allclose(found, theirs, atol=1e-5)
    mine = backbone.decode(sampled(backbone, PROMPTS, scale=4.0)).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-4)


def test_a_prompt_is_read_twice(backbone):
    """The CLIPs' tokens with zeros behind them up to T5's width, then T5's; ids, lengths and spans of both."""
    cond = backbone.encode(PROMPTS)
    front, behind = cond.readings()
    assert cond.tokens.shape == (2, CLIP + T5, tiny_sd3.TOKENS)
    assert not front.tokens[..., 2 * tiny.WIDTH :].any()
    assert behind.tokens[..., 2 * tiny.WIDTH :].any()
    assert front.lengths.tolist() == [7, 6]  # with begin and end
    assert behind.lengths.tolist() == [6, 5]  # with end
    assert cond.lengths.tolist() == [CLIP + 6, CLIP + 5]
    assert backbone.spans(PROMPTS[0], "a cat") == [range(4, 6), range(CLIP + 3, CLIP + 5)]
    assert torch.equal(cond[[1]].readings()[1].tokens, backbone.encode(PROMPTS[1:]).readings()[1].tokens)
    assert torch.equal(last_words(cond), torch.cat([front.tokens[[0, 1], [5, 4]], behind.tokens[[0, 1], [4, 3]]]))


def test_ids_embed_as_prompts_encode(backbone):
    wanted, ids = backbone.encode(PROMPTS), backbone.tokenize(PROMPTS)
    found = backbone.embed(ids)
    for field in vars(wanted):
        torch.testing.assert_close(getattr(found, field), getattr(wanted, field), atol=1e-5, rtol=1e-5)
    one, other = backbone.encode(PROMPTS[:1]), backbone.encode(PROMPTS[1:])
    width, projected = tiny.WIDTH, tiny_sd3.PROJECTED
    parts = {
        "text_encoder": (slice(CLIP), slice(width), slice(projected)),
        "text_encoder_2": (slice(CLIP), slice(width, 2 * width), slice(projected, None)),
        "text_encoder_3": (slice(CLIP, None), slice(None), slice(0)),
    }
    for name, (places, columns, summary) in parts.items():
        mixed = backbone.embed({name: ids[name][1:]}, like=one)
        tokens, pooled = one.tokens.clone(), one.pooled.clone()
        tokens[:, places, columns], pooled[:, summary] = other.tokens[:, places, columns], other.pooled[:, summary]
        torch.testing.assert_close(mixed.tokens, tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed.pooled, pooled, atol=1e-5, rtol=1e-5)
        at = {"text_encoder": other, "text_encoder_2": one, "text_encoder_3": one}[name]
        assert mixed.before.tolist() == at.before.tolist()


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_vectors_have_a_gradient_and_lexicons_say_how_prompts_are_laid_out(backbone, name):
    ids = backbone.tokenize(["a cat"])
    lexicon = backbone.lexicon(name)
    assert ids[name][0, lexicon.begin + 2] == lexicon.end
    assert (ids[name][0, lexicon.begin + 3 :] == lexicon.pad).all()
    assert backbone.spell(name, ids[name][0]) == "a cat"
    vectors = lexicon.vectors[ids[name]].clone().requires_grad_()
    found = backbone.embed(ids, {name: vectors})
    (found.tokens.square().sum() + found.pooled.square().sum()).backward()
    assert vectors.grad.abs().sum() > 0
    assert "cat" in backbone.vocabulary("a cat", 3)
    assert backbone.summaries(PROMPTS).shape == (2, tiny_sd3.PROJECTED)


def edit(backbone, concept, neutral):
    """Deltas of both sites that send the concept prompts to the neutral ones, hard constraints."""
    w, u = backbone.encode(concept), backbone.encode(neutral)
    mine, goal = align(w, u)
    held = w.tokens[0, : CLIP + T5 - len(mine)].double()  # what both prompts begin with stays as it is
    pairs = {"tokens": (torch.cat([held, mine]), torch.cat([held, goal])), "pooled": (w.pooled.double(), u.pooled.double())}
    deltas = {}
    for site in backbone.text_sites():
        rows = pairs[site.reads]
        eye = torch.eye(rows[0].shape[1], dtype=torch.float64)
        sums = closedform.Pairs.empty(len(eye)).add(*rows)
        deltas[site.name] = closedform.whitened([sums], eye, error=0)[0].delta(backbone.weight(site.name))
    return deltas


@pytest.mark.parametrize(("concept", "neutral"), [("a cat", "a dog"), ("a cat", "a red ship"), ("a red kitten", "thing")])
def test_an_edit_of_both_entrances_makes_the_whole_forward_equal(backbone, concept, neutral):
    """Exact in both readings, pads included, with other token counts: text enters nowhere else."""
    deltas = edit(backbone, [concept], [neutral])
    w, u, x = backbone.encode([concept]), backbone.encode([neutral]), backbone.latents([3])
    with torch.no_grad():
        for tau in backbone.schedule(4).tau:
            base_w, base_u = (backbone.predict(x, tau[None], cond) for cond in (w, u))
            with merged(backbone.denoiser, deltas):
                erased = backbone.predict(x, tau[None], w)
            assert (erased - base_u).norm() < 1e-4 * base_u.norm()
            assert (base_w - base_u).norm() > 1e-3 * base_u.norm(), "the prompts were the same to begin with"


def test_each_reading_has_partners_of_its_own(backbone):
    """A neutral phrase of two words: CLIP's tokens are paired with CLIP's and T5's with T5's."""
    one, two = backbone.encode(["a cat by the ship"]), backbone.encode(["a red thing by the ship"])
    mine, goal = align(one, two)
    start = CLIP + T5 - len(mine)
    assert start == 2  # what both begin with is left out
    behind = CLIP - start
    assert not mine[:behind, 2 * tiny.WIDTH :].any()
    assert not goal[:behind, 2 * tiny.WIDTH :].any()
    assert torch.equal(goal[behind + 1], two.tokens[0, CLIP + 2].double())  # cat becomes thing
    assert torch.equal(goal[0], two.tokens[0, 3].double())


@pytest.mark.parametrize("tokens", ["last", "suffix"])
def test_the_concepts_last_token_counts_in_each_reading(backbone, tokens):
    concept = Concept.parse("cat").model_copy(update={"neutral": "dog"})
    ((w, u),) = pair_rows(backbone, concept, [("a cat by the ship", "a dog by the ship")], "tokens", tokens)
    one, two = (backbone.encode([f"a {word} by the ship"]).tokens[0].double() for word in ("cat", "dog"))
    places = [2, CLIP + 1] if tokens == "last" else [*range(2, CLIP), *range(CLIP + 1, CLIP + T5)]
    assert torch.equal(w, one[places])
    assert torch.equal(u, two[places])


def test_a_closed_form_reaches_both_entrances_of_text(backbone):
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
        torch.testing.assert_close(w @ (weight + to_dense(deltas[site.name])).T, wanted, atol=1e-5, rtol=1e-5)


def made_up(backbone, folder):
    """An erasure of a random change of both text sites."""
    generator, deltas = torch.Generator().manual_seed(0), {}
    for site in backbone.text_sites():
        out, width = backbone.weight(site.name).shape
        deltas[site.name] = LowRank(torch.randn(out, 2, generator=generator), torch.randn(2, width, generator=generator))
    Erasure.of(backbone, [Concept.parse("cat")], method="made-up", config={}, deltas={"cat": {"edit": deltas}}).save(folder)
    return Erasure.load(folder)


def test_a_certificate_tells_words_ends_and_pads_of_both_readings(backbone, tmp_path):
    erasure = made_up(backbone, tmp_path / "e")
    found = certificate(backbone, erasure, erasure.concepts, PROMPTS, protocol=Words.protocol)["mean"]
    change = to_dense(erasure.total()["context_embedder"]).double()
    moved = (backbone.encode(PROMPTS).tokens.double() @ change.T).square().mean(-1)
    places = torch.arange(CLIP + T5)
    ends = torch.tensor([[6, CLIP + 5], [5, CLIP + 4]])
    last = (places == ends[:, :1]) | (places == ends[:, 1:])
    words = (places < ends[:, :1]) | ((places >= CLIP) & (places < ends[:, 1:]))
    sizes = [float(moved[mask].mean().sqrt()) for mask in (words, last, ~words & ~last)]
    ratios = [found[key] / size for key, size in zip(PER_POSITION, sizes, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-4)


def test_an_erasure_loads_in_plain_diffusers_and_comes_off_again(backbone, tiny_sd3_folder, tmp_path):
    erasure = made_up(backbone, tmp_path / "e")
    pipe, own = plain(tiny_sd3_folder), plain(tiny_sd3_folder)
    base = drawn(pipe, PROMPTS, scale=3.0)
    load_into(pipe, tmp_path / "e")
    erased = drawn(pipe, PROMPTS, scale=3.0)
    own.load_lora_weights(str(tmp_path / "e"), weight_name="cat.safetensors", adapter_name="cat")
    assert torch.equal(drawn(own, PROMPTS, scale=3.0), erased)
    with merged(backbone.denoiser, erasure.total()):
        torch.testing.assert_close(sampled(backbone, PROMPTS, scale=3.0), erased, rtol=0, atol=1e-3)
    assert not torch.allclose(erased, base, rtol=0, atol=1e-2)
    unload(pipe)
    assert torch.equal(drawn(pipe, PROMPTS, scale=3.0), base)


def test_a_negative_prompt_is_the_pipelines_own_with_skipped_layers_too(backbone, tiny_sd3_folder, tmp_path):
    """The pipeline then calls the transformer once more, with the conditional rows alone."""
    ctx = RunContext(backbone=backbone, concepts=(Concept.parse("ship"),), task=None)
    NegativePrompt(NegativePromptConfig()).erase(ctx).save(tmp_path / "e")
    pipe = plain(tiny_sd3_folder)
    load_into(pipe, tmp_path / "e", component=plugins.default().components.get)
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    theirs = drawn(plain(tiny_sd3_folder), PROMPTS, scale=3.0, negative_prompt=["ship"] * 2, **skipped)
    torch.testing.assert_close(drawn(pipe, PROMPTS, scale=3.0, **skipped), theirs, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="guidance scale above 1"):
        drawn(pipe, PROMPTS, scale=1.0)


def test_exports_are_a_merged_folder_or_are_refused_in_a_line(backbone, tiny_sd3_folder, tmp_path, world):
    made_up(backbone, tmp_path / "e")
    how = {"backbone": {"path": str(tiny_sd3_folder), "device": "cpu"}, "registries": plugins.load([world])}
    with pytest.raises(UsageError, match=r"for Stable Diffusion 1.x and FLUX.1, and 'tiny-sd3' is neither. Use --to diffusers"):
        export(tmp_path / "e", "kohya", tmp_path / "k.safetensors", **how)
    with pytest.raises(UsageError, match=r"Only Stable Diffusion 1.x is written as one file"):
        export(tmp_path / "e", "merged", tmp_path / "m.safetensors", **how)
    folder = export(tmp_path / "e", "merged", tmp_path / "m", **how).path
    pipe = plain(tiny_sd3_folder)
    load_into(pipe, tmp_path / "e")
    torch.testing.assert_close(drawn(plain(folder), PROMPTS, scale=3.0), drawn(pipe, PROMPTS, scale=3.0), rtol=0, atol=1e-3)


def test_a_folder_of_another_model_or_without_t5_is_refused_in_a_line(tiny_sd3_folder, tmp_path):
    with pytest.raises(
        EnvironmentProblem, match="is another kind of model: its transformer is of the class SD3Transformer2DModel, not Flux"
    ):
        tiny_flux.load(tiny_sd3_folder)
    StableDiffusion3Pipeline.from_pretrained(tiny_sd3_folder, text_encoder_3=None).save_pretrained(tmp_path / "sd3")
    with pytest.raises(EnvironmentProblem, match="'sd3' comes without 'text_encoder_3', with which a StableDiffusion3Pipeline"):
        tiny_sd3.load(tmp_path / "sd3")


@pytest.mark.parametrize("method", ["trace", "sld"])
def test_a_run_from_a_folder_to_its_report(tiny_sd3_folder, tmp_path, method):
    registries = plugins.load([THIRD_PARTY / "tiny_world.py", THIRD_PARTY / "natural_words.py"])
    overrides = [f"backbone.path={tiny_sd3_folder}", "backbone.device=cpu", "protocol.size=16", "protocol.steps=3"]
    overrides += SHORT.get(method, [])
    config = build({"method": method, "backbone": "sd35-medium", "task": "words", "concepts": ("cat",)}, overrides=overrides)
    result = run(config, out=tmp_path, registries=registries)
    place = path_of(tmp_path, resolve(config, registries))
    assert result.counts["failed"] == 0
    assert (place / "report.html").is_file()
    erased = plain(tiny_sd3_folder)
    load_into(erased, place / "erasure", component=registries.components.get)
    base, now = (drawn(p, PROMPTS[:1], scale=4.0, seeds=(1,)) for p in (plain(tiny_sd3_folder), erased))
    assert not torch.allclose(base, now, rtol=0, atol=1e-6), "the erasure changes nothing"


def test_the_command_runs_from_a_folder_to_its_report(tiny_sd3_folder, tmp_path):
    held = ["-s", f"backbone.path={tiny_sd3_folder}", "-s", "backbone.device=cpu", "-s", "protocol.size=16"]
    few = ["-s", "protocol.steps=2", "--limit", "1", "--out", str(tmp_path)]
    what = ["--method", "uce", "--backbone", "sd35-medium", "--task", "free", "--concept", "a cat"]
    assert main(["run", *what, *held, *few]) == 0
    (report,) = tmp_path.glob("sd35-medium/free/uce/*/report.html")
    assert "a cat" in report.read_text(encoding="utf-8")
    erased = plain(tiny_sd3_folder)
    load_into(erased, report.parent / "erasure")
    base, now = (drawn(p, PROMPTS[:1], scale=4.0, seeds=(1,)) for p in (plain(tiny_sd3_folder), erased))
    assert not torch.allclose(base, now, rtol=0, atol=1e-3), "the erasure changes nothing"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_erases_with_few_rows_and_in_bf16(tiny_sd3_folder, monkeypatch, method):
    """As `test_rows` and `test_bf16` have it of the other families; both types are finite, and the base stays as it was."""
    registries = plugins.load([THIRD_PARTY / "tiny_world.py"])
    kind = tiny_sd3.TinySD3
    monkeypatch.setattr(kind, "holding", dict.fromkeys(kind.holding, SMALL))
    monkeypatch.setattr(kind, "_share_of", lambda self, x: 1.0)
    monkeypatch.setattr(kind, "activations", classmethod(lambda cls, size: TIGHT))
    flags = {"method": method, "backbone": "tiny-sd3", "task": "words", "concepts": ("cat",)}
    held = [f"backbone.path={tiny_sd3_folder}", "backbone.device=cpu", "backbone.dtype=bfloat16", "backbone.vram=8"]
    plan = resolve(build(flags, overrides=[*held, *SHORT.get(method, [])]), registries)
    backbone = plan.backbone.load(plan.backbone_config)
    backbone.expect(lambda: plan.method(plan.method_config).texts(context(plan, backbone, registries)))
    seen = watched(backbone.denoiser)
    erasure = compute(plan, backbone, registries)
    assert backbone.unchanged()
    assert max(seen[False], default=0) <= ROWS
    assert max(seen[True], default=0) <= plan.method(plan.method_config).footprint(plan).rows
    if erasure.guidance is None:
        assert all(torch.isfinite(to_dense(delta)).all() for delta in erasure.total().values())
        assert any(to_dense(delta).any() for delta in erasure.total().values())


@pytest.mark.parametrize("attack", ["ring-a-bell", "concept-inversion"])
def test_attacks_search_the_tokens_of_all_three_encoders(attack):
    check_attack(attack, settings=ATTACKS[attack], backbones=["tiny-sd3"])


@pytest.mark.parametrize(("kind", "size"), [(StableDiffusion35Medium, 512), (StableDiffusion35Large, 1024)])
def test_the_work_of_a_pass_is_what_is_predicted(kind, size):
    name, config = kind.architecture
    with torch.device("meta"), FlopCounterMode(display=False) as counted, torch.no_grad():
        sd3_call(of_diffusers(name).from_config(config).to(torch.bfloat16), size, 1)
    assert kind.tflop(size) == pytest.approx(counted.get_total_flops() / 1e12, rel=0.02)


@pytest.mark.parametrize(("scope", "number"), [("add_kv", 6), ("add_qk", 6), ("qk_dual", 12), ("all_attn", 27), ("text", 2)])
def test_scopes(backbone, scope, number):
    assert len(backbone.lora_targets(scope)) == number
