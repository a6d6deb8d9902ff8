"""What an erasure leaves and moves, by predictions: against the same sums written out, and on the mini models."""

import json

import pytest
import torch

from erasekit.backbones.protocol import guided
from erasekit.erasures.deltas import LowRank, merged, scale
from erasekit.erasures.guidance import Guidance
from erasekit.erasures.remains import LIMIT, Remains, Residual
from erasekit.methods.context import RunContext
from erasekit.methods.prompts import neutral_of
from erasekit.methods.validation import Validation, remains_of, validation
from erasekit.registration.plugins import default
from erasekit.testing import tiny
from erasekit_mini.backbone import FluxMini, Sd15Mini
from erasekit_mini.tasks import Hazards, Objects
from erasekit_uce.method import Uce, UceConfig
from tests.third_party.tiny_world import Words

COMPONENT = default().components.get


@pytest.fixture(scope="module")
def ctx(tiny_folder):
    task = Words()
    return RunContext(
        tiny.load(tiny_folder), (task.concept("cat"), task.concept("dog")), task, component=default().components.get
    )


def some_deltas(ctx, size=0.3):
    generator = torch.Generator().manual_seed(3)
    found = {}
    for site in ctx.backbone.text_sites():
        out, width = ctx.backbone.weight(site.name).shape
        found[site.name] = LowRank(*(torch.randn(s, generator=generator) * size for s in ((out, 2), (2, width))))
    return found


@pytest.fixture(scope="module")
def drawn(ctx):
    return Validation(ctx)


def test_the_unedited_model_has_all_of_the_concept_and_no_drift(drawn):
    found = drawn.measure()
    assert set(found.residual) == {"cat", "dog"}
    for residual in found.residual.values():
        assert residual.prompts == pytest.approx(1, abs=1e-4)
    assert found.drift == pytest.approx(0, abs=1e-4)


@torch.no_grad()
def test_residual_and_drift_by_hand(ctx, drawn):
    """The definition in float64, point by point, from predictions made one by one."""
    backbone, scale_, empty = ctx.backbone, ctx.protocol.guidance, ctx.backbone.encode([""])

    def follow(pool, i, text):
        x, tau = pool.x[[i]], pool.tau[[i]]
        return guided(backbone, x, tau, backbone.encode([text]), uncond=empty, scale=scale_).double().flatten()

    shares = {"cat": [], "dog": []}
    with merged(backbone.denoiser, some_deltas(ctx)):
        edited = [follow(drawn.pool, i, drawn.asked[int(r)].text) for i, r in enumerate(drawn.pool.row)]
        moved = [follow(drawn.kept, i, _kept_text(ctx, drawn, i)) for i in range(len(drawn.kept))]
        found = drawn.measure()
    for n, prompt in enumerate(drawn.asked):
        top = bottom = 0.0
        for i in (drawn.pool.row == n).nonzero().flatten().tolist():
            concept = follow(drawn.pool, i, prompt.text)
            neutral = follow(drawn.pool, i, neutral_of(prompt, ctx.concepts))
            top += float((edited[i] - neutral) @ (concept - neutral))
            bottom += float((concept - neutral) @ (concept - neutral))
        if prompt.set == "erase":
            shares[prompt.concept].append(min(max(top / bottom, 0), 1))
    for name, values in shares.items():
        assert found.residual[name].prompts == pytest.approx(sum(values) / len(values), abs=1e-3)
    change = reach = 0.0
    for i in range(len(drawn.kept)):
        before, nothing = follow(drawn.kept, i, _kept_text(ctx, drawn, i)), follow(drawn.kept, i, "")
        change += float((moved[i] - before).square().sum())
        reach += float((before - nothing).square().sum())
    assert found.drift == pytest.approx((change / reach) ** 0.5, rel=1e-3)


def _kept_text(ctx, drawn, i):
    return ctx.prompts("preserve", "validation")[int(drawn.kept.row[i])].text


def test_trajectories_are_drawn_once_and_hold_only_validation_prompts(ctx):
    assert validation(ctx) is validation(ctx)
    asked = {p.text for p in validation(ctx).asked}
    assert asked <= {p.text for which in ("erase", "synonyms") for p in ctx.prompts(which, "validation")}


def test_a_residual_above_the_limit_is_a_warning_that_names_the_concept():
    found = Remains(
        residual={"cat": Residual(prompts=LIMIT + 0.1, other_words=None), "dog": Residual(prompts=0.0, other_words=LIMIT)},
        drift=0.1,
    )
    (line,) = found.warnings()
    assert line.startswith("'cat' is not erased: 40% of it is left")
    assert (
        found.line()
        == "residual: cat 0.40, in other words not measured; dog 0.00, in other words 0.30 | drift of what stays: 0.10"
    )


@pytest.fixture(scope="module", params=[Sd15Mini, FluxMini])
def mini(request):
    return request.param.load(request.param.Config(device="cpu"))


def test_what_erases_on_the_minis_leaves_little_and_a_third_of_it_more(mini):
    """UCE erases "cat" on both minis (benchmarks/README.md); a third of its edit does not."""
    task = Objects()
    ctx = RunContext(mini, (task.concept("cat"),), task, component=COMPONENT)
    erasure = Uce(UceConfig(**Uce.defaults[mini.name])).erase(ctx)
    whole = remains_of(ctx, erasure)
    assert whole.residual["cat"].prompts < 0.1
    assert whole.residual["cat"].other_words < 0.2
    assert whole.drift < 0.2
    assert not whole.warnings()
    with merged(mini.denoiser, scale(erasure.total(), 1 / 3)):
        third = validation(ctx).measure()
    assert third.residual["cat"].prompts > LIMIT
    assert third.drift < whole.drift
    assert len(third.warnings()) == 1


def test_a_guidance_that_changes_nothing_leaves_everything(mini):
    """The scheme of the negative prompt with the empty prompt as its text is the model as it is."""
    task = Hazards()
    ctx = RunContext(mini, (task.concept("hazard"),), task, component=COMPONENT)
    nothing = Guidance("negative-prompt", {}, ("", ""), mini.encode(["", ""]), scale=1.0)
    found = validation(ctx).measure(nothing)
    assert found.residual["hazard"].prompts == pytest.approx(1, abs=1e-3)
    assert found.drift == pytest.approx(0, abs=1e-3)


def test_erase_prints_it_and_the_files_hold_it(erasekit, tmp_path):
    done = erasekit("erase", "--method", "uce", "--concept", "cat", "--out", "erased")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "erased" / "erasure.json").read_text())
    assert manifest["residual"]["cat"]["prompts"] < 0.1
    assert 0 < manifest["drift"] < 0.2
    assert manifest["warnings"] == []
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("residual:")]
    assert line in (tmp_path / "erased" / "README.md").read_text().replace("\\|", "|")


def test_what_is_left_is_a_warning_everywhere(erasekit, tmp_path):
    """Nothing is erased by a tenth of the edit: the terminal, results, report and card say so."""
    flags = ["-s", "method.steps=0", "-s", "method.eta=0.1", "--limit", "2", "-s", "protocol.steps=2"]
    done = erasekit("run", "--concept", "cat", *flags)
    assert done.returncode == 0, done.stderr
    said = "'cat' is not erased"
    assert f"Warning: {said}" in done.stderr
    assert "Warning: Stage 1 is nearly off" in done.stderr
    (run,) = (tmp_path / "runs/sd15-mini/objects/trace").glob("[!.]*")
    assert json.loads((run / "erasure" / "erasure.json").read_text())["figures"]["eta"] == 0.1
    for file in ("results.json", "report.html", "erasure/README.md"):
        assert said in (run / file).read_text().replace("&#39;", "'"), file
