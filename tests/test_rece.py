"""RECE: the adversarial embedding, the rounds against independent solutions, and the stage after other methods."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erasekit.backbones.alignment import align
from erasekit.erasures.deltas import Dense, LowRank, merged, to_dense
from erasekit.erasures.erasure import Erasure
from erasekit.methods.context import RunContext
from erasekit.methods.method import MethodConfig
from erasekit.methods.prompts import concept_pairs, preserve_prompts
from erasekit.methods.sites import pair_rows
from erasekit_rece import plugin
from erasekit_rece.method import Rece, ReceConfig, Rounds, robustify
from erasekit_rece.solve import adversary
from erasekit_uce.method import Uce, UceConfig
from tests.third_party.tiny_world import Words

D = 10

mini_uce = partial(UceConfig, **Uce.defaults["sd15-mini"])  # what the mini models have
mini_rece = partial(ReceConfig, **Rece.defaults["sd15-mini"])  # what the mini models have


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(backbone, names=("cat",), **settings):
    task = Words()
    return RunContext(backbone, tuple(task.concept(name) for name in names), task, **settings)


def total(deltas, module):
    return sum((to_dense(own[module]).double() for own in deltas.values() if module in own), torch.zeros(()).double())


# The adversarial embedding


@settings(max_examples=60, deadline=None)
@given(
    outs=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    rank=st.integers(0, D),
    n=st.integers(1, 4),
    ridge=st.sampled_from([1e-3, 0.1, 3.0]),
    unit=st.sampled_from(["relative", "absolute"]),
    seed=st.integers(0, 999),
)
def test_adversary_minimises_its_objective(outs, rank, n, ridge, unit, seed):
    """min sum |W' c' - W c|^2 + ridge |c'|^2 as one least-squares problem; W' may have lost any number of dimensions."""
    keep = torch.linalg.qr(normal(D, D, seed=seed)).Q[:, :rank]
    base = [normal(out, D, seed=seed + 1 + k) for k, out in enumerate(outs)]
    edited = [w @ keep @ keep.T for w in base]
    c = normal(n, D, seed=seed + 9)
    absolute = ridge * (sum(float(w.square().sum()) for w in edited) / D if unit == "relative" else 1)
    left = torch.cat([*edited, absolute**0.5 * torch.eye(D, dtype=torch.float64)]).numpy()
    right = torch.cat([*(w @ c.T for w in base), torch.zeros(D, n, dtype=torch.float64)]).numpy()
    want = np.linalg.lstsq(left, right, rcond=None)[0].T
    found = (c @ adversary(base, edited, ridge=ridge, unit=unit).T).numpy()
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-8 * max(1, np.abs(want).max()))


def test_adversary_of_an_unedited_layer_is_the_embedding_itself():
    w, c = normal(20, D, seed=1), normal(3, D, seed=2)
    torch.testing.assert_close(c @ adversary([w], [w], ridge=1e-9).T, c, rtol=0, atol=1e-6)


def test_adversary_undoes_an_edit_that_only_turns_the_input():
    w, c, turn = normal(20, D, seed=1), normal(3, D, seed=2), torch.linalg.qr(normal(D, D, seed=3)).Q
    found = c @ adversary([w, w[:7]], [w @ turn, w[:7] @ turn], ridge=1e-9).T
    torch.testing.assert_close(found, c @ turn, rtol=0, atol=1e-6)


# Rounds


def of_concepts(ctx, reads):
    """All rows e_w and e_u of all concepts, stacked."""
    asked = ctx.prompts("erase")
    found = [pair for c in ctx.concepts for pair in pair_rows(ctx.backbone, c, concept_pairs(c, asked), reads)]
    return [torch.cat(side) for side in zip(*found, strict=True)]


def of_kept(ctx, reads):
    """All rows that are held, stacked: the empty prompt's as often as there are other prompts."""
    prompts = preserve_prompts(ctx)
    cond = ctx.backbone.encode([*prompts, *[""] * (len(prompts) - 2)])
    return (cond.pooled if reads == "pooled" else cond.tokens.flatten(0, 1)).double()


def independent_round(w, u, base, edited, kept, *, adversary_ridge, ridge):
    """One round written down with normal equations: the adversarial embeddings, and the delta of each layer."""
    w, u = w.numpy(), u.numpy()
    gram = sum(new.T @ new for new in edited)
    pull = adversary_ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    found = np.linalg.solve(gram + pull, sum(new.T @ old for old, new in zip(base, edited, strict=True)) @ w.T).T
    system = found.T @ found + kept.T @ kept
    system = system + ridge * np.trace(system) / len(system) * np.eye(len(system))
    return found, [np.linalg.solve(system, found.T @ (u - found) @ new.T).T for new in edited]


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("names", [("cat",), ("cat", "dog")])
def test_rounds_are_the_published_formulas_one_after_the_other(backbone, names, hold):
    scales = {"adversary_ridge": 0.02, "round_ridge": 0.03, "round_preserve_scale": 0.4}
    config = mini_rece(rounds=2, ridge=0.05, hold=hold, rank_error=0, **scales)
    ctx = context(backbone, names)
    erasure = Rece(config).erase(ctx)
    start = Uce(mini_uce(ridge=0.05, rank_error=0)).erase(ctx)
    assert list(erasure.deltas) == list(names)
    for reads in {site.reads for site in backbone.text_sites()}:
        (cat, thing), sites = of_concepts(ctx, reads), [site.name for site in backbone.text_sites() if site.reads == reads]
        base = [backbone.weight(site).double().numpy() for site in sites]
        now = [w + to_dense(start.total()[site]).numpy() for w, site in zip(base, sites, strict=True)]
        kept = [0.4**0.5 * of_kept(ctx, reads).numpy()]
        if hold:
            kept += [cat.numpy(), thing.numpy()]
        for _ in range(2):
            found, deltas = independent_round(cat, thing, base, now, np.concatenate(kept), adversary_ridge=0.02, ridge=0.03)
            now = [w + delta for w, delta in zip(now, deltas, strict=True)]
            kept += [found] if hold else []
        for w, site, new in zip(base, sites, now, strict=True):
            mine = w + to_dense(erasure.total()[site]).numpy()
            np.testing.assert_allclose(mine, new, rtol=0, atol=1e-8 * np.abs(new).max())


def test_no_rounds_are_uce(backbone):
    ctx = context(backbone, ("cat", "dog"))
    mine, plain = Rece(mini_rece(rounds=0)).erase(ctx), Uce(mini_uce()).erase(ctx)
    for name in ("cat", "dog"):
        for site, delta in plain.deltas[name]["edit"].items():
            torch.testing.assert_close(to_dense(mine.deltas[name]["edit"][site]), to_dense(delta), rtol=1e-8, atol=1e-10)


def relative_distances(backbone, erasure, found):
    """(concept to neutral, adversary to concept, adversary to neutral) after an edit, relative to concept - neutral."""
    ctx = context(backbone)
    sums = torch.zeros(4).double()
    for site in backbone.text_sites():
        w, u = of_concepts(ctx, site.reads)
        base = backbone.weight(site.name).double()
        new, c = base + to_dense(erasure.total()[site.name]).double(), found[site.reads]
        gaps = [(w - u) @ base.T, w @ new.T - u @ base.T, c @ new.T - w @ base.T, c @ new.T - u @ base.T]
        sums += torch.stack([gap.square().sum() for gap in gaps])
    return (sums[1:] / sums[0]).sqrt().tolist()


def test_the_adversary_brings_the_concept_back_and_a_round_takes_it_away(wide):
    ctx = context(wide)
    plain = Uce(mini_uce()).erase(ctx)
    found = {}
    for reads in {site.reads for site in wide.text_sites()}:
        names = [site.name for site in wide.text_sites() if site.reads == reads]
        base = [wide.weight(name).double() for name in names]
        edited = [w + to_dense(plain.total()[name]) for w, name in zip(base, names, strict=True)]
        found[reads] = of_concepts(ctx, reads)[0] @ adversary(base, edited, ridge=1e-2).T
    hardened = Rece(mini_rece(rounds=1)).erase(ctx)
    loose = Rece(mini_rece(rounds=1, hold=False)).erase(ctx)
    concept, back, gone = relative_distances(wide, plain, found)
    assert concept < 0.05
    assert back < 0.05  # after UCE, c' reads almost as the concept did
    assert gone > 0.9
    concept, back, gone = relative_distances(wide, hardened, found)
    assert concept < 0.05
    assert back > 1  # after a round it reads nearer to the neutral
    assert gone < 0.6
    assert relative_distances(wide, loose, found)[0] > 0.5  # what `hold` is for: the concept's own prompts are back


def test_an_erased_prompt_is_still_erased(wide):
    erasure = Rece(mini_rece()).erase(context(wide))
    x, tau = wide.latents([1]), torch.tensor([0.5])
    cat, thing = (wide.encode([f"a photo of {name}"]) for name in ("cat", "thing"))
    with torch.no_grad():
        mine, goal = (wide.predict(x, tau, cond) for cond in (cat, thing))
        with merged(wide.denoiser, erasure.total()):
            left = wide.predict(x, tau, cat)
    assert (left - goal).norm() < 0.3 * (mine - goal).norm()


def test_rounds_are_logged(backbone):
    lines = []
    Rece(mini_rece(rounds=2)).erase(context(backbone, log=lambda *line: lines.append(line)))
    assert [line[:2] for line in lines] == [(1, 2), (2, 2)]
    assert all(0 <= values["recovered"] <= 1 for _, _, values in lines)


def test_the_official_preset_knows_the_bare_concept_and_the_empty_prompt_alone(backbone):
    config = ReceConfig(**Rece.presets["official"])
    ctx = context(backbone)
    cat, empty = backbone.encode(["cat"]), backbone.encode([""])
    first = Rece(config.model_copy(update={"rounds": 0, "rank_error": 0})).erase(ctx)
    for site in backbone.text_sites():
        weight, pooled = backbone.weight(site.name).double().numpy(), site.reads == "pooled"
        pair = (cat.pooled, empty.pooled) if pooled else align(cat, empty)
        w, u, p = (rows.double().numpy() for rows in (*pair, empty.pooled if pooled else empty.tokens[0]))
        system = w.T @ w + p.T @ p + 0.5 * np.eye(w.shape[1])  # UCE's Eq. 7 with the published lambda
        want = np.linalg.solve(system, w.T @ (u - w) @ weight.T).T
        np.testing.assert_allclose(to_dense(first.total()[site.name]).numpy(), want, rtol=0, atol=1e-6 * np.abs(want).max())


# The stage


class OtherConfig(MethodConfig):
    """Settings of a method that knows nothing of RECE, but for two."""

    ridge: float = 0.3
    adversary_ridge: float = 0.5
    rank_error: float = 0.0


def edit_of(backbone, seed=0):
    """A dense delta of one text site, low-rank ones of the others but one, and one of a layer that reads no text."""
    shapes = {site.name: backbone.weight(site.name).shape for site in backbone.text_sites()}
    first, *rest = shapes
    deltas = {first: Dense(0.05 * normal(*shapes[first], seed=seed).float())}
    for k, name in enumerate(rest[1:]):
        out, width = shapes[name]
        deltas[name] = LowRank(0.2 * normal(out, 2, seed=seed + k).float(), 0.2 * normal(2, width, seed=seed - k - 1).float())
    other = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q" if backbone.prefix == "unet" else "x_embedder"
    return deltas | {other: Dense(torch.ones_like(backbone.weight(other)))}, other


def test_the_stage_starts_from_whatever_deltas_it_is_given(backbone):
    ctx = context(backbone, ("cat", "dog"))
    (cat, other), (shared, _) = edit_of(backbone), edit_of(backbone, seed=50)
    given = {"cat": cat, "shared": shared}
    result = robustify(ctx, given, OtherConfig())
    assert list(result) == ["cat", "shared", "dog"]
    assert result["shared"] is shared
    assert result["cat"][other] is cat[other]
    stage = Rounds()
    for reads in {site.reads for site in backbone.text_sites()}:
        (w_ND, u_ND), sites = of_concepts(ctx, reads), [site.name for site in backbone.text_sites() if site.reads == reads]
        base = [backbone.weight(site).double().numpy() for site in sites]
        now = [w + np.asarray(total(given, site)) for w, site in zip(base, sites, strict=True)]
        kept = torch.cat([of_kept(ctx, reads), w_ND, u_ND]).numpy()
        _, deltas = independent_round(w_ND, u_ND, base, now, kept, adversary_ridge=0.5, ridge=stage.round_ridge)
        for site, start, delta, w in zip(sites, now, deltas, base, strict=True):
            mine = w + total(result, site).numpy()
            np.testing.assert_allclose(mine, start + delta, rtol=0, atol=1e-6 * np.abs(start + delta).max())


def test_uce_with_the_stage_is_rece(backbone):
    ctx = context(backbone, component=lambda slot, name: {("robustify", "rece"): robustify}[slot, name])
    hardened, whole = Uce(mini_uce(robustify="rece")).erase(ctx), Rece(mini_rece()).erase(ctx)
    for site, delta in whole.total().items():
        torch.testing.assert_close(to_dense(hardened.total()[site]), to_dense(delta), rtol=1e-7, atol=1e-9)


def test_what_is_registered():
    methods, components = {}, {}
    plugin.register_methods(lambda name, target, **_: methods.update({name: target}))
    plugin.register_components(lambda slot, name, target, **_: components.update({(slot, name): target}))
    assert methods == {"rece": f"{Rece.__module__}:{Rece.__name__}"}
    assert components == {("robustify", "rece"): f"{robustify.__module__}:{robustify.__name__}"}


# Whole erasures


@pytest.mark.parametrize("config", [mini_rece(), ReceConfig(**Rece.presets["official"])], ids=["default", "official"])
def test_an_erasure_is_saved_loaded_and_the_same_again(backbone, tmp_path, config):
    before = {key: value.clone() for key, value in backbone.denoiser.state_dict().items()}
    hashes = [Rece(config).erase(context(backbone, ("cat", "dog"))).save(tmp_path / str(i)) for i in range(2)]
    after = backbone.denoiser.state_dict()
    assert hashes[0] == hashes[1]
    assert all(torch.equal(before[key], after[key]) for key in before)
    loaded = Erasure.load(tmp_path / "0", backbone)
    assert ReceConfig(**loaded.config) == config
    assert {name: list(parts) for name, parts in loaded.deltas.items()} == {"cat": ["edit"], "dog": ["edit"]}
