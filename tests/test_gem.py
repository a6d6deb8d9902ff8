"""GEM: its loss against a plain formula, and what training does to it."""

import math

import pytest
import torch

from erasekit.methods.adapters import AdapterBank
from erasekit.methods.context import RunContext
from erasekit_gem.method import Gem, GemConfig, Repelled, repelled
from tests.third_party.tiny_world import Words


def test_the_loss_is_the_papers_formula():
    g = torch.Generator().manual_seed(0)
    student, anchor, concept = (torch.randn(4, 3, 5, generator=g, dtype=torch.float64) for _ in range(3))
    student[0] = anchor[0]  # nothing to pull
    wanted = 0.0
    for f, a, c in zip(student, anchor, concept, strict=True):
        pull, push = (
            math.sqrt(sum((x - y) ** 2 for x, y in zip(f.flatten().tolist(), o.flatten().tolist(), strict=True)))
            for o in (a, c)
        )
        wanted += 100 / 4 * max(0.0, pull - 0.5 * push)
    assert float(repelled(student, anchor, concept, eta=0.5, gamma=100.0)) == pytest.approx(wanted, rel=1e-5)
    assert float(repelled(anchor, anchor, concept, eta=0.0, gamma=100.0)) == 0


def test_points_are_the_first_steps_of_the_students_own_path(backbone):
    task = Words()
    ctx = RunContext(backbone, (task.concept("cat"),), task)
    ctx.protocol = ctx.protocol.model_copy(update={"steps": 5})
    with AdapterBank(backbone) as bank:
        bank.add("cat", backbone.lora_targets(_scope(backbone)), 2, ctx.generator("init"))
        losses = Repelled(GemConfig(share=0.6), ctx, bank, ctx.concepts[0])
        x, tau, row = losses.trajectory(torch.Generator().manual_seed(3))
        assert torch.equal(tau, backbone.schedule(5, ctx.protocol.size).tau[:3])
        assert 0 <= row < len(losses.asked)
        for p in bank.train_only("cat"):
            p.data += 0.5
        moved, _, _ = losses.trajectory(torch.Generator().manual_seed(3))
    assert torch.equal(x[0], moved[0])
    assert not torch.allclose(x[1:], moved[1:]), "the trajectory is not the student's"


def test_passes_share_the_points_of_a_step(backbone):
    task = Words()
    ctx = RunContext(backbone, (task.concept("cat"),), task)
    ctx.protocol = ctx.protocol.model_copy(update={"steps": 4})
    with AdapterBank(backbone) as bank:
        bank.add("cat", backbone.lora_targets(_scope(backbone)), 2, ctx.generator("init"))
        whole = Repelled(GemConfig(share=1.0), ctx, bank, ctx.concepts[0])(0, torch.Generator())["repel"]
        halves = Repelled(GemConfig(share=1.0, accumulate=2), ctx, bank, ctx.concepts[0])
        parts = [halves(k, torch.Generator())["repel"] for k in range(2)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss(backbone):
    task, seen = Words(), []
    ctx = RunContext(backbone, (task.concept("cat"),), task, log=lambda step, total, values: seen.append(values["repel"]))
    ctx.protocol = ctx.protocol.model_copy(update={"steps": 4})
    Gem(GemConfig(steps=12, lr=1e-2, rank=4, scope=_scope(backbone))).erase(ctx)
    assert sum(seen[-3:]) < 0.9 * sum(seen[:3])


def _scope(backbone):
    return "kv" if backbone.prefix == "unet" else "qk_dual"
