"""The certificate against the same quantities by hand, and against edits that are known to have or lack them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from erasekit.backbones.alignment import align
from erasekit.concepts import Concept
from erasekit.erasures.certificate import certificate
from erasekit.erasures.deltas import Dense, merged
from erasekit.erasures.erasure import Erasure
from erasekit.evaluation.tasks import Protocol
from erasekit.methods import closedform
from erasekit.testing import tiny

CAT = Concept(name="cat", phrases=("a cat",), neutral="a thing", templates=("{}",))
CLEAN = ["a photo of a dog", "a red ship"]
STEPS = 6
PROTOCOL = Protocol(steps=STEPS, size=16)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny.load(tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd"))


def erasure(backbone, edit):
    modules = dict(backbone.denoiser.named_modules())
    deltas = {} if edit is None else {s.name: edit.delta(modules[s.name].weight) for s in backbone.text_sites()}
    return Erasure(
        method="test", config={}, concepts=(CAT,), backbone="tiny", prefix="unet", base={}, deltas={"cat": {"refine": deltas}}
    )


def pairs(backbone):
    return align(backbone.encode(["a cat"]), backbone.encode(["a thing"]))


def summed(edits, eta=1.0):
    """The sum of edits, damped."""
    return closedform.TextEdit(eta * torch.cat([e.difference_DN for e in edits], 1), torch.cat([e.read_ND for e in edits]))


def whitened(w, u, spread, **settings):
    return closedform.whitened([closedform.Pairs.empty(tiny.WIDTH).add(w, u)], spread, error=0, **settings)[0]


def certify(backbone, edit):
    return certificate(backbone, erasure(backbone, edit), [CAT], CLEAN, protocol=PROTOCOL, tau0=0.5, drift=True)


def test_no_edit(backbone):
    found = certify(backbone, None)
    drift = dict.fromkeys(("neutral_drift", "other_drift", "drift_words", "drift_end", "drift_pads", "delta"), 0)
    assert found["max"] == pytest.approx({"to_neutral": 1, "equal": 1} | drift)
    assert all(row["clean"] == row["concept"] == 0 for row in found["prediction_drift"])


def test_each_solver_shows_what_it_promises(backbone):
    w, u = pairs(backbone)
    tokens = backbone.encode(["a red photo of vint", *CLEAN]).tokens.flatten(0, 1).double()
    spread = tokens.T @ tokens / len(tokens) + 1e-3 * torch.eye(tiny.WIDTH, dtype=torch.float64)
    held = certify(backbone, whitened(w, u, spread))
    assert max(held["max"][k] for k in ("to_neutral", "equal", "neutral_drift")) < 1e-5
    projected = certify(backbone, summed(closedform.delta_projection(w, u)))
    assert projected["max"]["equal"] < 1e-5 < 1e-2 < projected["max"]["to_neutral"]
    eq1 = certify(backbone, summed(closedform.eq1(w, u)))
    assert eq1["max"]["to_neutral"] < 1e-5 < 1e-2 < eq1["max"]["neutral_drift"]
    weighted = certify(backbone, whitened(w, u, spread, fix_neutral=False))  # Eq. 1's constraint, less drift
    assert weighted["max"]["to_neutral"] < 1e-5
    assert weighted["mean"]["other_drift"] < eq1["mean"]["other_drift"]


def test_numbers_are_those_of_a_hook_on_the_edited_model(backbone):
    """Thm 3.1 as it says: what the layers give out, on the model itself."""
    edit = summed(closedform.eq1(*pairs(backbone)), 0.7)
    found = certify(backbone, edit)
    w, u = pairs(backbone)
    modules = dict(backbone.denoiser.named_modules())
    before = {s.name: [modules[s.name](e.float()).double() for e in (w, u)] for s in backbone.text_sites()}
    with merged(backbone.denoiser, erasure(backbone, edit).total()), torch.no_grad():
        after = {s.name: [modules[s.name](e.float()).double() for e in (w, u)] for s in backbone.text_sites()}
    for row in found["sites"]:
        (bw, bu), (aw, au) = before[row["site"]], after[row["site"]]
        reach = (bw - bu).norm()
        assert row["to_neutral"] == pytest.approx(float((aw - bu).norm() / reach), rel=1e-4)
        assert row["equal"] == pytest.approx(float((aw - au).norm() / reach), rel=1e-4)
        assert row["neutral_drift"] == pytest.approx(float((au - bu).norm() / reach), rel=1e-4)
    assert len(found["sites"]) == len(backbone.text_sites())
    assert found["mean"]["equal"] == pytest.approx(sum(r["equal"] for r in found["sites"]) / len(found["sites"]))


def test_prediction_drift_is_on_the_bases_own_trajectory(backbone):
    edit = summed(closedform.eq1(*pairs(backbone)))
    found = certify(backbone, edit)
    schedule, cond, x = backbone.schedule(STEPS), backbone.encode(CLEAN), backbone.latents([0, 1])
    for k, row in enumerate(found["prediction_drift"]):
        tau = schedule.tau[k].expand(2)
        with torch.no_grad():
            base = backbone.predict(x, tau, cond)
            with merged(backbone.denoiser, erasure(backbone, edit).total()):
                moved = backbone.predict(x, tau, cond)
        assert row["tau"] == pytest.approx(k / STEPS, abs=2e-3)
        assert row["clean"] == pytest.approx(float((moved - base).norm() / base.norm()), rel=1e-4)
        x = backbone.step(base, x, k, schedule)
    early = [row["clean"] for row in found["prediction_drift"] if row["tau"] < 0.499]
    assert found["early_drift"]["clean"] == pytest.approx(sum(early) / len(early))
    assert found["early_drift"]["tau0"] == 0.5


def test_of_the_weights_alone_it_takes_no_prediction(backbone, monkeypatch):
    edit = summed(closedform.eq1(*pairs(backbone)))
    whole = certify(backbone, edit)
    monkeypatch.setattr(backbone, "predict", None)
    alone = certificate(backbone, erasure(backbone, edit), [CAT], CLEAN, protocol=PROTOCOL)
    assert alone == {key: value for key, value in whole.items() if "drift" not in key}


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_drift_is_split_by_position(family, request):
    """What clean prompts' words, end tokens and pads move, token by token; a pooled embedding has no positions."""
    backbone = request.getfixturevalue(family)
    cond, names = backbone.encode(CLEAN), ("drift_words", "drift_end", "drift_pads")
    site = next(s.name for s in backbone.text_sites() if s.reads == "tokens")
    change = torch.randn(backbone.weight(site).shape, generator=torch.Generator().manual_seed(0))
    deltas = {"cat": {"refine": {site: Dense(change)}}}
    erasure = Erasure(
        method="test", config={}, concepts=(CAT,), backbone="tiny", prefix=backbone.prefix, base={}, deltas=deltas
    )
    found = certificate(backbone, erasure, [CAT], CLEAN, protocol=PROTOCOL)
    row = next(row for row in found["sites"] if row["site"] == site)
    weight, (w, u) = backbone.weight(site).double(), align(backbone.encode(["a cat"]), backbone.encode(["a thing"]))
    reach = ((w - u) @ weight.T).square().mean().sqrt()
    moved = {name: [] for name in names}
    for tokens, length in zip(cond.tokens.double(), cond.lengths.tolist(), strict=True):
        for i, token in enumerate(tokens):
            name = names[0] if i < length - 1 else names[1] if i == length - 1 else names[2]
            moved[name].append(change.double() @ token)
    for name, rows in moved.items():
        assert row[name] == pytest.approx(float(torch.stack(rows).square().mean().sqrt() / reach), rel=1e-6)
    pooled = {s.name for s in backbone.text_sites() if s.reads == "pooled"}
    assert {row["site"] for row in found["sites"] if "drift_pads" not in row} == pooled


def test_it_leaves_the_base_alone_and_is_json(backbone):
    before = {k: v.clone() for k, v in backbone.denoiser.state_dict().items()}
    found = certify(backbone, summed(closedform.eq1(*pairs(backbone))))
    assert all(torch.equal(v, before[k]) for k, v in backbone.denoiser.state_dict().items())
    assert json.loads(json.dumps(found)) == found
    assert all(math.isfinite(v) for row in found["sites"] for k, v in row.items() if k != "site")
