"""UCE on the tiny models: the numbers of an erasure, which positions are edited, what stays."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from erasekit.concepts import Concept
from erasekit.erasures.deltas import merged, summed, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.errors import UsageError
from erasekit.events import Progressed, heard
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import concept_pairs, preserve_prompts
from erasekit.methods.sites import held, pair_rows, site_embeddings
from erasekit.registration.plugins import default
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from erasekit.testing import tiny_flux
from erasekit_uce.method import Uce, UceConfig
from tests.third_party.tiny_world import Words

COMPONENT = default().components.get

mini_uce = partial(UceConfig, **Uce.defaults["sd15-mini"])  # what the mini models have


class NoPrompts(Words):
    """A task that adds no prompts to those of the concept."""

    def prompts(self, which, concepts, split, limit=None):
        return []


def context(backbone, names=("cat",), **changes):
    task = Words()
    concepts = tuple(task.concept(name).model_copy(update=changes) for name in names)
    return RunContext(backbone, concepts, task, component=COMPONENT)


def every(cond, reads):
    return (cond.pooled if reads == "pooled" else cond.tokens.flatten(0, 1)).double()


def total(erasure, module):
    return to_dense(erasure.total()[module]).double()


def of_concepts(ctx, reads, tokens="all", guide=None):
    """All rows e_w and e_u of all concepts, stacked."""
    found = []
    for concept in ctx.concepts:
        guided = concept if guide is None else concept.model_copy(update={"neutral": guide})
        prompts = concept_pairs(guided, ctx.prompts("erase"))
        found += pair_rows(ctx.backbone, guided, prompts, reads, tokens)
    return [torch.cat(side) for side in zip(*found, strict=True)]


def of_kept(ctx, reads):
    """All rows that are held, stacked: the empty prompt's as often as there are other prompts."""
    prompts = preserve_prompts(ctx)
    return torch.cat([every(ctx.backbone.encode([p]), reads) for p in [*prompts, *[""] * (len(prompts) - 2)]])


def loop_solution(w, u, p, weight, *, ridge, erase, preserve):
    """The published formula with loops over embeddings, one concept after the other in one system."""
    matrix = weight.double().numpy()
    w, u, p = w.numpy(), u.numpy(), p.numpy()
    c = erase * w.T @ w + preserve * p.T @ p
    pull = ridge * np.trace(c) / len(c)
    left = pull * matrix
    for a, b in zip(w, u, strict=True):
        left = left + erase * np.outer(matrix @ b, a)
    for a in p:
        left = left + preserve * np.outer(matrix @ a, a)
    return np.linalg.solve((c + pull * np.eye(len(c))).T, left.T).T - matrix


@pytest.mark.parametrize("names", [("cat",), ("cat", "dog")])
@pytest.mark.parametrize("tokens", ["last", "suffix", "all"])
def test_every_site_is_the_published_formula(backbone, names, tokens):
    ctx = context(backbone, names)
    config = mini_uce(tokens=tokens, ridge=0.02, erase_scale=0.7, preserve_scale=0.3, rank_error=0)
    erasure = Uce(config).erase(ctx)
    assert set(erasure.deltas) == set(names)
    assert {site.name for site in backbone.text_sites()} == set(erasure.total())
    for site in backbone.text_sites():
        rows = *of_concepts(ctx, site.reads, tokens), of_kept(ctx, site.reads)
        want = loop_solution(*rows, backbone.weight(site.name), ridge=0.02, erase=0.7, preserve=0.3)
        np.testing.assert_allclose(total(erasure, site.name).numpy(), want, rtol=0, atol=1e-8 * np.abs(want).max())


def test_all_text_sites_are_edited_and_nothing_else(backbone):
    modules = set(Uce(mini_uce()).erase(context(backbone)).total())
    if backbone.prefix == "unet":
        expected = {n for n in dict(backbone.denoiser.named_modules()) if n.endswith(("attn2.to_k", "attn2.to_v"))}
        assert modules == expected
        assert len(modules) > 2
    else:
        assert modules == {"context_embedder", "time_text_embed.text_embedder.linear_1"}


def test_flux_is_edited_without_loading_the_transformer(tiny_flux_folder):
    backbone = tiny_flux.load(tiny_flux_folder)
    Uce(mini_uce()).erase(context(backbone))
    assert "transformer" not in backbone._parts


def test_the_concept_reads_as_its_neutral_and_the_preserved_stay(wide):
    """Relative to the distance between the two; a bias that counts twice would show here."""
    erasure = Uce(mini_uce(ridge=1e-6, preserve_scale=3.0)).erase(context(wide))
    modules = dict(wide.denoiser.named_modules())
    cat, thing, ship, empty = (wide.encode([p]) for p in ("a photo of cat", "a photo of thing", "a photo of a ship", ""))

    def outputs(read):
        return [modules[s.name](read(s.reads).to(wide.dtype)).double() for s in wide.text_sites()]

    def distance(a, b):
        return sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5

    inputs = [lambda reads, c=cond: every(c, reads) for cond in (cat, thing, empty, ship)]
    with torch.no_grad():
        with_cat, with_thing, with_nothing, with_ship = (outputs(read) for read in inputs)
        span = distance(with_cat, with_thing)
        with merged(wide.denoiser, erasure.total()):
            now = [outputs(read) for read in inputs]
    assert distance(now[0], with_thing) < 0.02 * span
    assert distance(now[2], with_nothing) < 0.02 * span
    assert distance(now[3], with_ship) < 0.02 * span


def test_erased_prompts_are_predicted_as_neutral_ones(wide):
    ctx = context(wide)
    erasure = Uce(mini_uce(ridge=1e-6)).erase(ctx)
    x, tau = wide.latents([1]), torch.tensor([0.5])
    cat, thing = (wide.encode([f"a photo of {name}"]) for name in ("cat", "thing"))
    with torch.no_grad():
        mine, goal = (wide.predict(x, tau, cond) for cond in (cat, thing))
        with merged(wide.denoiser, erasure.total()):
            left = wide.predict(x, tau, cat)
    assert (left - goal).norm() < 0.05 * (mine - goal).norm()


@pytest.mark.parametrize("tokens", ["last", "suffix", "all"])
def test_positions(backbone, tokens):
    """Prompts of one template: 'a photo of cat in the red', where the concept stands before the end."""
    concept = Concept(name="cat", phrases=("cat",), neutral="thing", templates=("a photo of {} in the red",))
    ctx = RunContext(backbone, (concept,), NoPrompts(), component=COMPONENT)
    rows = {reads: of_concepts(ctx, reads, tokens) for reads in {site.reads for site in backbone.text_sites()}}
    cond, goal = (backbone.encode([f"a photo of {w} in the red"]) for w in ("cat", "thing"))
    at = backbone.spans("a photo of cat in the red", "cat")[-1][-1]
    length = cond.tokens.shape[1]
    first = 0 if tokens == "all" and backbone.prefix != "unet" else at  # T5 reads both ways: the words before it differ too
    kept = slice(first, at + 1 if tokens == "last" else length)
    assert torch.equal(rows["tokens"][0], cond.tokens[0, kept].double())
    assert torch.equal(rows["tokens"][1], goal.tokens[0, kept].double())
    if "pooled" in rows:
        assert torch.equal(rows["pooled"][0], cond.pooled.double())


def test_the_last_token_of_a_phrase_is_paired_with_the_neutral_noun(backbone):
    concept = Concept(name="cat", phrases=("red kitten",), neutral="thing", templates=("a photo of {}",))
    ctx = RunContext(backbone, (concept,), NoPrompts(), component=COMPONENT)
    found = of_concepts(ctx, "tokens", "last")
    cond, goal = backbone.encode(["a photo of red kitten"]), backbone.encode(["a photo of thing"])
    at, there = backbone.spans("a photo of red kitten", "kitten")[0][-1], backbone.spans("a photo of thing", "thing")[0][-1]
    assert torch.equal(found[0], cond.tokens[0, at : at + 1].double())
    assert torch.equal(found[1], goal.tokens[0, there : there + 1].double())


def test_prompts_are_encoded_under_one_count(backbone):
    """Whoever watches sees how far the encoding is, not the same few prompts again and again."""
    prompts, said = [f"a photo of {'very ' * i}red" for i in range(20)], []
    with heard(said.append):
        whole = held(backbone, prompts, "tokens")
    assert {event.total for event in said if isinstance(event, Progressed) and event.total > 1} == {20}
    rows = backbone.encode(prompts).tokens.flatten(0, 1).double()
    torch.testing.assert_close(whole.total_DD, rows.T @ rows)


def test_a_prompt_without_the_phrase_is_edited_at_its_last_word(backbone):
    """A task's prompt may ask for the concept in other words; the empty guide takes the place of any prompt."""
    concept = Concept(name="cat", phrases=("kitten",), templates=("{}",))
    found = of_concepts(RunContext(backbone, (concept,), Words(), component=COMPONENT), "tokens", "last")
    at = backbone.spans("a photo of a cat", "cat")[0][-1]
    want = [backbone.encode(["kitten"]).tokens[0, backbone.spans("kitten", "kitten")[0][-1]]]
    want.append(backbone.encode(["a photo of a cat"]).tokens[0, at])
    assert torch.equal(found[0], torch.stack(want).double())


def test_what_is_preserved(backbone):
    ctx = context(backbone, ("cat", "dog"), preserve=("ship", "dog"), templates=("{}", "a photo of {}"))
    prompts = preserve_prompts(ctx)
    assert prompts == ["", "ship", "a photo of ship", "a photo of a ship"]  # the dog is erased itself
    cond = backbone.encode(["a photo of a ship", ""])
    rows = cond.tokens.flatten(0, 1).double()  # every pad
    torch.testing.assert_close(held(backbone, ["a photo of a ship", ""], "tokens").total_DD, rows.T @ rows)
    rows, preserved = of_kept(ctx, "tokens"), site_embeddings(ctx)["tokens"].preserve
    torch.testing.assert_close(preserved.total_DD, rows.T @ rows)
    torch.testing.assert_close(preserved.mean_DD, rows.T @ rows / len(rows))


def test_guides_take_the_place_of_the_neutral_words(backbone):
    ctx = context(backbone)
    plain, empty = (site_embeddings(ctx, guides=guides)["tokens"].pairs[0] for guides in ((), ("",)))
    assert not torch.equal(plain.uu_DD, empty.uu_DD)
    bare = context(backbone, neutral="")
    assert torch.equal(site_embeddings(bare)["tokens"].pairs[0].uu_DD, empty.uu_DD)


def test_two_guides_give_the_least_squares_compromise(backbone):
    """min |W' w - W a|^2 + |W' w - W b|^2 is reached at their mean."""
    ctx = context(backbone, templates=("{}",))
    both = Uce(mini_uce(tokens="last", guides=("red ship", "thing ship"), ridge=0.01, rank_error=0)).erase(ctx)
    guides = ("red ship", "thing ship")
    for site in backbone.text_sites():
        (w, one), (_, two) = (of_concepts(ctx, site.reads, "last", guide) for guide in guides)
        rows = w, (one + two) / 2, of_kept(ctx, site.reads)
        want = loop_solution(*rows, backbone.weight(site.name), ridge=0.01, erase=1.0, preserve=1.0)
        np.testing.assert_allclose(total(both, site.name).numpy(), want, rtol=0, atol=1e-8 * np.abs(want).max())


def test_a_guide_counts_as_its_share(backbone):
    """min .25 |W' w - W a|^2 + .75 |W' w - W b|^2 is reached at their weighted mean."""
    ctx, guides = context(backbone, templates=("{}",)), ("red ship", "thing ship")
    deltas = Uce(mini_uce(tokens="last", guides=guides, ridge=0.01, rank_error=0)).edit(ctx, {"cat": [0.25, 0.75]})["cat"]
    for site in backbone.text_sites():
        (w, one), (_, two) = (of_concepts(ctx, site.reads, "last", guide) for guide in guides)
        rows = w, 0.25 * one + 0.75 * two, of_kept(ctx, site.reads)
        want = loop_solution(*rows, backbone.weight(site.name), ridge=0.01, erase=1.0, preserve=1.0)
        np.testing.assert_allclose(to_dense(deltas[site.name]).numpy(), want, rtol=0, atol=1e-8 * np.abs(want).max())


@pytest.mark.parametrize("guides", [(), ("red",)])
def test_debiasing_needs_something_to_share(backbone, guides):
    with pytest.raises(UsageError, match="Debiasing needs two guides or more"):
        Uce(mini_uce(guides=guides, debias_rounds=1)).erase(context(backbone))


@pytest.mark.slow
@pytest.mark.parametrize("mini", ["sd15-mini", "flux-mini"])
def test_debiasing_draws_both_guides_where_equal_shares_draw_one(mini):
    """On noise that debiasing has not seen; the mini models draw a ship for one background in twenty, a cat for the others."""
    plan = resolve(build({"method": "uce", "backbone": mini, "concepts": ("cat",)}), default())
    concept = Concept(name="background", phrases=("a background",), templates=("a photo of {}", "a picture of {}"))
    ctx = RunContext(
        plan.backbone.load(plan.backbone_config),
        (concept,),
        NoPrompts(),
        protocol=plan.protocol,
        component=default().components.get,
    )
    method = Uce(mini_uce(guides=("a cat", "a ship"), debias_rounds=5, debias_images=24))
    shares = method.shares(ctx)["background"]
    fresh, scorer = replace(ctx, seed=1), default().components.get("scorer", "mini")()
    assert sum(shares) == pytest.approx(1)
    assert shares[1] > shares[0]
    ships = []
    for weights in ([0.5, 0.5], shares):
        with merged(ctx.backbone.denoiser, summed(list(method.edit(ctx, {"background": weights}).values()))):
            ships.append(method.seen(fresh, concept, scorer)[1])
    assert ships[0] < 0.15
    assert 0.2 < ships[1] < 0.8


def test_a_concept_that_is_its_neutral_is_an_error(backbone):
    with pytest.raises(UsageError, match=r"'cat'.*no prompt of it would change"):
        Uce(mini_uce()).erase(context(backbone, neutral="cat"))


def test_the_official_preset_is_the_published_edit_of_the_bare_concept(backbone):
    """Eq. 7 in float64 with the published lambda: one token of each bare phrase, and nothing is preserved."""
    ctx = context(backbone, phrases=("cat", "a kitten"), templates=("a photo of {}",), preserve=("ship",))
    erasure = Uce(UceConfig(**Uce.presets["official"] | {"rank_error": 0})).erase(ctx)
    prompts = ["cat", "a kitten"]
    mine, empty = backbone.encode(prompts), backbone.encode([""])
    last = mine.lengths - 2  # before the end token
    for site in backbone.text_sites():
        weight = backbone.weight(site.name).double().numpy()
        if site.reads == "pooled":
            c, u = mine.pooled.double().numpy(), empty.pooled.double().expand(2, -1).numpy()
        else:
            c = torch.stack([mine.tokens[i, k] for i, k in enumerate(last)]).double().numpy()
            u = empty.tokens[0, [0, 0] if backbone.prefix == "unet" else [-1, -1]].double().numpy()
        left, right = 0.5 * weight, 0.5 * np.eye(weight.shape[1])
        for a, b in zip(c, u, strict=True):
            left, right = left + np.outer(weight @ b, a), right + np.outer(a, a)
        want = np.linalg.solve(right.T, left.T).T - weight
        np.testing.assert_allclose(total(erasure, site.name).numpy(), want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_an_absolute_ridge_is_the_published_lambda(backbone, caplog):
    config = mini_uce(tokens="last", guides=[""], ridge=0.5, ridge_unit="absolute", rank_error=0)
    ctx = context(backbone)
    erasure = Uce(config).erase(ctx)
    for site in backbone.text_sites():
        rows = *of_concepts(ctx, site.reads, "last", ""), of_kept(ctx, site.reads)
        relative = 0.5 / ((rows[0].square().sum() + rows[2].square().sum()).item() / rows[0].shape[1])
        want = loop_solution(*rows, backbone.weight(site.name), ridge=relative, erase=1.0, preserve=1.0)
        np.testing.assert_allclose(total(erasure, site.name).numpy(), want, rtol=0, atol=1e-8 * np.abs(want).max())
    assert not caplog.records
    Uce(config.model_copy(update={"ridge": 1e-9})).erase(ctx)
    assert "negligible" in caplog.text


def test_a_stage_hardens_the_edit(backbone):
    seen = []

    def stage(ctx, deltas, config):
        seen.append(config.robustify)
        return {name: {} for name in deltas} | {"cat": dict(list(deltas["cat"].items())[:1])}

    ctx = context(backbone)
    ctx.component = lambda slot, name: {("robustify", "mine"): stage}[slot, name]
    erasure = Uce(mini_uce(robustify="mine")).erase(ctx)  # as `-s method.robustify=mine` gives it
    assert seen == [("mine",)]
    assert len(erasure.total()) == 1


def test_an_erasure_is_saved_loaded_and_the_same_again(backbone, tmp_path):
    before = {key: value.clone() for key, value in backbone.denoiser.state_dict().items()}
    hashes = [Uce(mini_uce()).erase(context(backbone, ("cat", "dog"))).save(tmp_path / str(i)) for i in range(2)]
    after = backbone.denoiser.state_dict()
    assert hashes[0] == hashes[1]
    assert all(torch.equal(before[key], after[key]) for key in before)
    loaded = Erasure.load(tmp_path / "0", backbone)
    assert UceConfig(**loaded.config) == mini_uce()
    assert {name: list(parts) for name, parts in loaded.deltas.items()} == {"cat": ["edit"], "dog": ["edit"]}
