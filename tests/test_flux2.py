"""The FLUX.2 [klein] backbones against diffusers itself, prompts in a chat template, and erasures from them."""

import inspect
import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch.utils.flop_counter import FlopCounterMode

from erasekit.attacks.tokens import compose, words
from erasekit.backbones.alignment import align
from erasekit.backbones.flux2 import LAYERS, Flux2Klein4B, Flux2Klein9B, Flux2KleinBase4B
from erasekit.backbones.held import of_diffusers
from erasekit.backbones.protocol import Backbone, guided
from erasekit.concepts import Concept
from erasekit.erasures.certificate import PER_POSITION, certificate
from erasekit.erasures.deltas import Dense, LowRank, merged, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.erasures.loading import load_into, unload
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.methods.context import RunContext
from erasekit.methods.sites import last_words
from erasekit.registration import plugins
from erasekit.runs.compute import compute, context
from erasekit.runs.config import build
from erasekit.runs.exporting import export
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from erasekit.testing import check_attack, check_backbone, tiny_flux, tiny_flux2
from erasekit_negative_prompt.method import NegativePrompt, NegativePromptConfig
from tests.conftest import THIRD_PARTY
from tests.contracts.test_attacks import SHORT as ATTACKS
from tests.fake_memory import flux2_call
from tests.test_rows import METHODS, ROWS, SHORT, SMALL, TIGHT, watched
from tests.third_party.tiny_world import Words

PROMPTS = ["a photo of a cat", "a dog by vint"]
NAME = "text_encoder"
LENGTH, HEAD, TAIL = tiny_flux2.POSITIONS, 3, 8  # of the template, the end token not counted


@pytest.fixture(scope="module")
def backbone(tiny_flux2_base_folder):
    return tiny_flux2.load(tiny_flux2_base_folder, distilled=False)


@pytest.fixture(scope="module")
def distilled(tiny_flux2_folder):
    return tiny_flux2.load(tiny_flux2_folder)


def plain(folder, dtype=torch.float32):
    pipe = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompts, *, scale, steps=4, kind="np", seeds=(7, 8), size=16, **more):
    """What the plain pipeline draws from text."""
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    how = {"num_inference_steps": steps, "guidance_scale": scale, "max_sequence_length": LENGTH, "output_type": kind}
    return pipe(prompt=prompts, generator=generator, height=size, width=size, **how, **more).images


def last_latents(pipe, *args, **how):
    """The plain pipeline's latents after its last step, in the form in which its denoiser takes them."""
    seen = []
    drawn(pipe, *args, **how, callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["latents"]) or tensors)
    return seen[-1]


@torch.no_grad()
def sampled(backbone, prompts, *, scale, steps=4, seeds=(7, 8), size=16):
    """Latents of the adapter's own loop."""
    schedule, cond, empty = backbone.schedule(steps, size), backbone.encode(prompts), backbone.encode([""])
    x = backbone.latents(seeds, size)
    for k in range(steps):
        tau = schedule.tau[k].expand(len(x))
        x = backbone.step(guided(backbone, x, tau, cond, uncond=empty, scale=scale), x, k, schedule)
    return x


def test_they_are_backbones(backbone, distilled):
    assert isinstance(backbone, Backbone)
    assert backbone.capabilities.names() == {"dit", "velocity", "cfg", "causal"}
    assert distilled.capabilities.names() == {"dit", "velocity", "embedded", "causal"}
    assert (backbone.embedded_guidance, distilled.embedded_guidance) == (False, True)


def test_what_is_read_of_the_language_model_is_what_the_pipeline_reads():
    given = inspect.signature(Flux2KleinPipeline.__call__).parameters
    assert given["text_encoder_out_layers"].default == LAYERS
    assert given["max_sequence_length"].default == Flux2KleinBase4B.positions


def test_the_contract_is_kept_in_bf16(tiny_flux2_folder):
    check_backbone("flux2-klein-4b", settings={"path": str(tiny_flux2_folder), "dtype": "bfloat16"}, size=16)


@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-5), ("bfloat16", 0.05)])
def test_sampling_is_the_pipelines_own(tiny_flux2_base_folder, dtype, near):
    backbone = tiny_flux2.load(tiny_flux2_base_folder, dtype=dtype, distilled=False)
    pipe = plain(tiny_flux2_base_folder, getattr(torch, dtype))
    mine, theirs = sampled(backbone, PROMPTS, scale=4.0), last_latents(pipe, PROMPTS, scale=4.0)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=near)
    assert not torch.allclose(theirs, last_latents(pipe, PROMPTS, scale=40.0), rtol=0, atol=2 * near)


def test_a_distilled_model_has_no_use_for_a_scale(distilled, tiny_flux2_folder, capfd):
    pipe = plain(tiny_flux2_folder)
    theirs = last_latents(pipe, PROMPTS, scale=1.0)
    for scale in (1.0, 4.0):
        torch.testing.assert_close(sampled(distilled, PROMPTS, scale=scale), theirs, rtol=0, atol=2e-5)
    capfd.readouterr()
    arguments = distilled.call_arguments(distilled.encode(PROMPTS), empty=distilled.encode([""]), guidance=4.0)
    found = last_latents(pipe, None, scale=arguments.pop("guidance_scale"), **arguments)
    torch.testing.assert_close(found, theirs, rtol=0, atol=2e-5)
    assert "ignored" not in capfd.readouterr().err


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_other_sizes_are_the_pipelines_too(backbone, tiny_flux2_base_folder, scale):
    how = {"scale": scale, "steps": 2, "size": 24}
    theirs = last_latents(plain(tiny_flux2_base_folder), PROMPTS, **how)
    torch.testing.assert_close(sampled(backbone, PROMPTS, **how), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("steps", "size"), [(4, 1024), (50, 1024), (4, 2048), (4, 16)])
def test_the_steps_are_shifted_by_the_numbers_of_tokens_and_of_steps(backbone, steps, size):
    """Two lines in the number of tokens, of 10 and of 200 steps, and a third one between them; beyond 4300 tokens one."""
    tokens = (size // backbone._side(size) and (backbone._side(size) // 2)) ** 2
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    shift = many if tokens > 4300 else few + (many - few) * (steps - 10) / 190
    s = np.linspace(1, 1 / steps, steps)
    sigma = np.exp(shift) / (np.exp(shift) + 1 / s - 1)
    np.testing.assert_allclose(1 - backbone.schedule(steps, size).tau.numpy(), sigma, atol=1e-6)


def test_images_are_the_pipelines(backbone, tiny_flux2_base_folder):
    pipe = plain(tiny_flux2_base_folder)
    theirs = drawn(pipe, PROMPTS, scale=4.0)
    arguments = backbone.call_arguments(backbone.encode(PROMPTS), empty=backbone.encode([""]), guidance=4.0)
    np.testing.assert_allclose(drawn(pipe, None, scale=arguments.pop("guidance_scale"), **arguments), theirs, atol=1e-5)
    mine = backbone.decode(sampled(backbone, PROMPTS, scale=4.0)).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-4)


def test_images_become_the_latents_that_the_pipeline_makes_of_them(backbone, tiny_flux2_base_folder):
    pipe = plain(tiny_flux2_base_folder)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        theirs = pipe._pack_latents(pipe._encode_vae_image(images, generator=None))
    torch.testing.assert_close(backbone.to_latents(images), theirs)


def test_a_prompt_stands_in_a_chat_template(backbone):
    """Its tokens, the end token and then the template's other words and pads; no word of the template is the prompt's."""
    cond = backbone.encode(PROMPTS)
    tokens = backbone._pipe.tokenizer.convert_ids_to_tokens(cond.ids[0])
    said = ["a", "Ġphoto", "Ġof", "Ġa", "Ġcat"]
    template = ["Ċ", "<|im_start|>", "assistant", "Ċ", "<think>", "ĊĊ", "</think>", "ĊĊ"]
    pads = ["<|endoftext|>"] * (LENGTH - HEAD - len(said) - 1 - TAIL)
    assert tokens == ["<|im_start|>", "user", "Ċ", *said, "<|im_end|>", *template, *pads]
    assert cond.tokens.shape == (2, LENGTH, 3 * tiny_flux2.WIDTH)
    assert cond.lengths.tolist() == [HEAD + 5 + 1, HEAD + 4 + 1]
    assert torch.equal(last_words(cond), cond.tokens[[0, 1], [HEAD + 4, HEAD + 3]])
    assert backbone.spans("user", "user") == [range(3, 4)]
    assert backbone.spans("a cat", "assistant") == backbone.spans("a cat", "user") == backbone.spans("a cat", "") == []


def test_phrases_are_found_as_whole_words_in_either_case(backbone):
    assert backbone.spans("a photo of a cat", "a cat") == [range(6, 8)]
    assert backbone.spans("cat by the cat, redcat", "cat") == [range(3, 4), range(6, 7)]
    assert backbone.spans("A Cat", "a cat") == [range(3, 8)]  # in letters, the space too
    long = " ".join(["a"] * 40 + ["cat"])
    assert backbone.spans(long, "cat") == []  # it is cut off
    assert backbone.encode([long]).lengths.tolist() == [LENGTH]


def test_text_is_read_from_left_to_right(backbone):
    """No token before a word knows of it; every one from it on does, the template's and the pads too."""
    one, two = (backbone.encode([f"a photo of a {word} by the ship"]).tokens[0] for word in ("cat", "dog"))
    differs = ~torch.isclose(one, two, atol=1e-4).all(1)
    assert differs.nonzero().flatten().tolist() == list(range(HEAD + 4, LENGTH))


def test_a_templates_words_are_paired_with_themselves(backbone):
    """Neutral words of another number move what stands behind them; the pads take what is left."""
    one, two = backbone.encode(["a cat by the ship"]), backbone.encode(["a red thing by the ship"])
    mine, goal = align(one, two)
    start = LENGTH - len(mine)
    assert start == HEAD + 1
    ids = {float(row.sum()): int(i) for row, i in zip(two.tokens[0].double(), two.ids[0], strict=True)}
    partners, said = [ids[float(row.sum())] for row in goal], two.ids[0].tolist()
    behind = 3 + 1 + TAIL  # "by the ship", the end token and the template's
    thing = HEAD + 2
    assert partners[: 1 + behind] == [said[thing], *one.ids[0, start + 1 : start + 1 + behind].tolist()]
    assert sorted(partners[1 + behind :]) == sorted([*said[thing + 1 + behind :], said[HEAD + 1]])


def test_ids_embed_as_prompts_encode(backbone):
    prompts = [*PROMPTS, ""]
    wanted, found = backbone.encode(prompts), backbone.embed(backbone.tokenize(prompts))
    torch.testing.assert_close(found.tokens, wanted.tokens, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.lengths, wanted.lengths)
    assert torch.equal(backbone.embed({}, like=wanted).tokens, wanted.tokens)


def test_vectors_have_a_gradient_and_the_lexicon_says_how_prompts_are_laid_out(backbone):
    ids = backbone.tokenize(["a cat"])[NAME]
    lexicon = backbone.lexicon(NAME)
    assert (lexicon.begin, int(ids[0, HEAD + 2])) == (HEAD, lexicon.end)
    assert (ids[0, HEAD + 3 + TAIL :] == lexicon.pad).all()
    tokens = backbone._pipe.tokenizer.convert_tokens_to_ids(["cat", "Ġcat", "<think>", "<|im_start|>", "<|endoftext|>"])
    assert lexicon.usable[tokens].tolist() == [True, True, False, False, False]
    assert backbone.spell(NAME, ids[0]) == "a cat"
    vectors = lexicon.vectors[ids].clone().requires_grad_()
    backbone.embed({NAME: ids}, {NAME: vectors}).tokens.square().sum().backward()
    assert vectors.grad[:, HEAD : HEAD + 2].abs().sum() > 0


def test_a_prompt_that_is_put_together_is_the_one_that_is_typed(backbone):
    """Spaces belong to tokens: what comes behind slots has one, and the template stands behind the end."""
    cat = words(backbone, NAME, " cat")
    made = compose(backbone, NAME, ["a photo of ", 1, "by the ship"])
    assert torch.equal(made.hard(cat), backbone.tokenize(["a photo of cat by the ship"])[NAME])
    full = compose(backbone, NAME, [" ".join(["a"] * 40), 2])
    assert full.ids.shape == (1, LENGTH)
    assert (int(full.ids[0, -1]), len(full.at)) == (backbone.lexicon(NAME).end, 0)


def test_near_words_and_summaries(backbone):
    assert "cat" in backbone.vocabulary("a cat", 3)
    found = backbone.summaries(PROMPTS)
    ends = backbone.encode(PROMPTS).lengths - 1
    torch.testing.assert_close(found.float(), backbone.encode(PROMPTS).tokens[[0, 1], ends], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("concept", "neutral"), [("a cat", "a dog"), ("a photo of a cat", "a photo of a ship")])
def test_an_edit_of_the_one_entrance_makes_the_whole_forward_equal(tiny_flux2_base_folder, concept, neutral):
    """Exact, pads and template included, for neutral words of as many tokens: text enters nowhere else. In float64, since pads
    are read so much alike that an edit of them all is large."""
    backbone = tiny_flux2.load(tiny_flux2_base_folder, distilled=False)
    w, u = backbone.encode([concept]), backbone.encode([neutral])
    backbone.denoiser.double()
    backbone.dtype = torch.float64
    x, (mine, goal) = backbone.latents([3]), align(w, u)
    held = w.tokens[0, : LENGTH - len(mine)].double()  # what both prompts begin with stays as it is
    rows = torch.cat([held, mine]), torch.cat([held, goal])
    (site,) = backbone.text_sites()
    wanted = (rows[1] - rows[0]) @ backbone.weight(site.name).T
    deltas = {site.name: Dense(torch.linalg.lstsq(rows[0], wanted, driver="gelsd").solution.T)}
    with torch.no_grad():
        for tau in backbone.schedule(4).tau:
            base_w, base_u = (backbone.predict(x, tau[None], cond) for cond in (w, u))
            with merged(backbone.denoiser, deltas):
                erased = backbone.predict(x, tau[None], w)
            assert (erased - base_u).norm() < 1e-6 * base_u.norm()
            assert (base_w - base_u).norm() > 1e-2 * base_u.norm(), "the prompts were the same to begin with"


def made_up(backbone, folder):
    """An erasure of a random change of the text site and of a fused layer of both streams."""
    generator, deltas = torch.Generator().manual_seed(0), {}
    for name in (
        "context_embedder",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.1.attn.to_out",
    ):
        out, width = backbone.weight(name).shape
        deltas[name] = LowRank(torch.randn(out, 2, generator=generator), 0.3 * torch.randn(2, width, generator=generator))
    Erasure.of(backbone, [Concept.parse("cat")], method="made-up", config={}, deltas={"cat": {"edit": deltas}}).save(folder)
    return Erasure.load(folder)


def test_a_certificate_tells_words_ends_and_pads(backbone, tmp_path):
    erasure = made_up(backbone, tmp_path / "e")
    found = certificate(backbone, erasure, erasure.concepts, PROMPTS, protocol=Words.protocol)["mean"]
    change = to_dense(erasure.total()["context_embedder"]).double()
    moved = (backbone.encode(PROMPTS).tokens.double() @ change.T).square().mean(-1)
    places, ends = torch.arange(LENGTH), torch.tensor([[HEAD + 5], [HEAD + 4]])
    sizes = [float(moved[mask].mean().sqrt()) for mask in (places < ends, places == ends, places > ends)]
    ratios = [found[key] / size for key, size in zip(PER_POSITION, sizes, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-4)


def test_an_erasure_loads_in_plain_diffusers_and_comes_off_again(backbone, tiny_flux2_base_folder, tmp_path):
    erasure = made_up(backbone, tmp_path / "e")
    pipe, own = plain(tiny_flux2_base_folder), plain(tiny_flux2_base_folder)
    draw = partial(last_latents, scale=3.0)
    base = draw(pipe, PROMPTS)
    load_into(pipe, tmp_path / "e")
    erased = draw(pipe, PROMPTS)
    own.load_lora_weights(str(tmp_path / "e"), weight_name="cat.safetensors", adapter_name="cat")
    assert torch.equal(draw(own, PROMPTS), erased)
    with merged(backbone.denoiser, erasure.total()):
        torch.testing.assert_close(sampled(backbone, PROMPTS, scale=3.0), erased, rtol=0, atol=1e-3)
    assert not torch.allclose(erased, base, rtol=0, atol=1e-2)
    unload(pipe)
    assert torch.equal(draw(pipe, PROMPTS), base)


def test_steering_without_guidance_is_refused_and_the_pipeline_says_how_it_calls(backbone, tiny_flux2_base_folder, tmp_path):
    """Loaded by somebody who has no backbone at hand: the pipeline of an undistilled model calls twice a step."""
    ctx = RunContext(backbone=backbone, concepts=(Concept.parse("ship"),), task=None)
    NegativePrompt(NegativePromptConfig()).erase(ctx).save(tmp_path / "e")
    pipe = plain(tiny_flux2_base_folder)
    load_into(pipe, tmp_path / "e", component=plugins.default().components.get)
    ships = backbone.encode(["ship"] * 2).tokens
    theirs = last_latents(plain(tiny_flux2_base_folder), PROMPTS, scale=3.0, negative_prompt_embeds=ships)
    torch.testing.assert_close(last_latents(pipe, PROMPTS, scale=3.0), theirs, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="guidance scale above 1"):
        drawn(pipe, PROMPTS, scale=1.0)


def test_exports_are_a_merged_folder_or_are_refused_in_a_line(backbone, tiny_flux2_base_folder, tmp_path, world):
    made_up(backbone, tmp_path / "e")
    how = {"backbone": {"path": str(tiny_flux2_base_folder), "device": "cpu"}, "registries": plugins.load([world])}
    with pytest.raises(UsageError, match=r"for Stable Diffusion 1.x and FLUX.1, and 'tiny-flux2-base' is neither"):
        export(tmp_path / "e", "kohya", tmp_path / "k.safetensors", **how)
    folder = export(tmp_path / "e", "merged", tmp_path / "m", **how).path
    pipe = plain(tiny_flux2_base_folder)
    load_into(pipe, tmp_path / "e")
    np.testing.assert_allclose(drawn(plain(folder), PROMPTS, scale=3.0), drawn(pipe, PROMPTS, scale=3.0), atol=1e-3)


def test_a_folder_of_another_model_is_refused_in_a_line(tiny_flux_folder, tiny_flux2_folder, tiny_flux2_base_folder, tmp_path):
    with pytest.raises(EnvironmentProblem, match="'flux2' could not be loaded as a FluxPipeline"):
        tiny_flux.load(tiny_flux2_folder)
    with pytest.raises(EnvironmentProblem, match="is another kind of model: its transformer is of the class FluxTrans"):
        tiny_flux2.load(tiny_flux_folder)
    with pytest.raises(EnvironmentProblem, match=r"is undistilled \(base\), and 'tiny-flux2' is distilled. Check "):
        tiny_flux2.load(tiny_flux2_base_folder)
    with pytest.raises(EnvironmentProblem, match=r"is distilled, and 'tiny-flux2-base' is undistilled \(base\)"):
        tiny_flux2.load(tiny_flux2_folder, distilled=False)
    other = Flux2KleinPipeline.from_pretrained(tiny_flux2_folder)
    other.save_pretrained(tmp_path / "other")
    settings = tmp_path / "other/tokenizer/tokenizer_config.json"
    right = settings.read_text()
    settings.write_text(json.dumps(json.loads(right) | {"padding_side": "left"}))
    with pytest.raises(EnvironmentProblem, match="could not be loaded as a Flux2KleinPipeline: its tokenizer puts pads"):
        tiny_flux2.load(tmp_path / "other")
    settings.write_text(right)
    index = json.loads((tmp_path / "other/model_index.json").read_text())
    index["text_encoder"][1] = "Mistral3ForConditionalGeneration"  # FLUX.2-dev's
    (tmp_path / "other/model_index.json").write_text(json.dumps(index))
    with pytest.raises(EnvironmentProblem, match="reads prompts with Mistral3ForConditionalGeneration, not Qwen3ForCausalLM"):
        tiny_flux2.load(tmp_path / "other")


@pytest.mark.parametrize(("name", "method"), [("flux.2-klein-4b", "uce"), ("flux2-klein-base-4b", "sld")])
def test_a_run_from_a_folder_to_its_report(tiny_flux2_folder, tiny_flux2_base_folder, tmp_path, name, method):
    registries = plugins.load([THIRD_PARTY / "tiny_world.py", THIRD_PARTY / "natural_words.py"])
    folder = tiny_flux2_base_folder if "base" in name else tiny_flux2_folder
    overrides = [f"backbone.path={folder}", "backbone.device=cpu", "protocol.size=16", "protocol.steps=3"]
    overrides += SHORT.get(method, [])
    config = build({"method": method, "backbone": name, "task": "words", "concepts": ("cat",)}, overrides=overrides)
    result = run(config, out=tmp_path, registries=registries)
    place = path_of(tmp_path, resolve(config, registries))
    assert result.counts["failed"] == 0
    assert (place / "report.html").is_file()
    erased = plain(folder)
    load_into(erased, place / "erasure", component=registries.components.get)
    base, now = (last_latents(p, PROMPTS[:1], scale=4.0, seeds=(1,)) for p in (plain(folder), erased))
    assert not torch.allclose(base, now, rtol=0, atol=1e-6), "the erasure changes nothing"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_erases_with_few_rows_and_in_bf16(tiny_flux2_base_folder, monkeypatch, method):
    """As `test_rows` and `test_bf16` have it of the other families; both types are finite, and the base stays as it was."""
    erases(method, "tiny-flux2-base", tiny_flux2_base_folder, monkeypatch)


@pytest.mark.parametrize("method", ["esd", "eraseflow", "gem"])
def test_methods_erase_from_a_distilled_model(tiny_flux2_folder, monkeypatch, method):
    erases(method, "tiny-flux2", tiny_flux2_folder, monkeypatch)


def erases(method, name, folder, monkeypatch):
    registries = plugins.load([THIRD_PARTY / "tiny_world.py"])
    kind = registries.backbones.get(name)
    monkeypatch.setattr(kind, "holding", dict.fromkeys(kind.holding, SMALL))
    monkeypatch.setattr(kind, "_share_of", lambda self, x: 1.0)
    monkeypatch.setattr(kind, "activations", classmethod(lambda cls, size: TIGHT))
    flags = {"method": method, "backbone": name, "task": "words", "concepts": ("cat",)}
    held = [f"backbone.path={folder}", "backbone.device=cpu", "backbone.dtype=bfloat16", "backbone.vram=8"]
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


@pytest.mark.parametrize("attack", ["ring-a-bell", "unlearndiff", "p4d-k", "concept-inversion"])
def test_attacks_search_the_tokens_between_the_templates_words(attack):
    check_attack(attack, settings=ATTACKS[attack], backbones=["tiny-flux2"])


@pytest.mark.parametrize(("kind", "size"), [(Flux2Klein4B, 512), (Flux2Klein9B, 1024)])
def test_the_work_of_a_pass_is_what_is_predicted(kind, size):
    name, config = kind.architecture
    with torch.device("meta"), FlopCounterMode(display=False) as counted, torch.no_grad():
        flux2_call(of_diffusers(name).from_config(config).to(torch.bfloat16), size, 1)
    assert kind.tflop(size) == pytest.approx(counted.get_total_flops() / 1e12, rel=0.02)


@pytest.mark.parametrize(("scope", "number"), [("add_kv", 4), ("add_qk", 4), ("qk_dual", 8), ("all_attn", 20), ("text", 1)])
def test_scopes(backbone, scope, number):
    """All attention has the fused layers of the single stream, two a block."""
    assert len(backbone.lora_targets(scope)) == number
