import itertools
import math

import pytest
import torch
from safetensors import safe_open

from erasekit.errors import ErasekitError
from erasekit.methods.context import RunContext
from erasekit.methods.training import TrainingConfig, train

CONFIG = TrainingConfig(steps=12, lr=0.05, warmup=3, weight_decay=0.1, checkpoint_every=4)


class Stopped(Exception):
    """Stands for a kill in the middle of a step."""


def context(directory=None, **options) -> RunContext:
    return RunContext(backbone=None, concepts=(), task=None, seed=3, directory=directory, **options)


def fresh() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (2,))]


def problem(parameters, stop_at=None, nan_at=None):
    """A regression whose data is drawn anew in every batch, and whose second parameter is used in every other batch only."""

    def losses(batch, generator):
        if batch == stop_at:
            raise Stopped
        x = torch.randn(4, 3, generator=generator)
        fit = (x @ parameters[0] - x[:, :2]).square().mean()
        small = (parameters[1] if batch % 2 else parameters[1].detach()).square().sum()
        return {"fit": fit * (math.nan if batch == nan_at else 1), "small": small}

    return losses


def run(directory=None, config=CONFIG, **options):
    parameters = fresh()
    train(problem(parameters, **options), parameters, config, ctx=context(directory), name="toy")
    return [p.detach() for p in parameters]


def step_of(path) -> int:
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


@pytest.mark.parametrize("stop_at", [3, 4, 7, 11])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, stop_at):
    whole = run()
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=stop_at)
    path = tmp_path / "checkpoints" / "toy.safetensors"
    assert path.exists() == (stop_at >= 4)
    resumed = run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert step_of(path) == 12


def test_a_resumed_training_does_not_repeat_what_is_done(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=9)
    batches, told = [], []
    parameters = fresh()
    losses = problem(parameters)

    def counted(batch, generator):
        batches.append(batch)
        return losses(batch, generator)

    ctx = context(tmp_path, log=lambda step, total, values: told.append((step, total, sorted(values))))
    train(counted, parameters, CONFIG, ctx=ctx, name="toy")
    assert batches == [8, 9, 10, 11]
    assert told == [(step, 12, ["fit", "small"]) for step in (9, 10, 11, 12)]


def test_a_loss_that_is_not_finite_names_itself_and_its_step(tmp_path):
    with pytest.raises(ErasekitError) as info:
        run(tmp_path, nan_at=6)
    message = str(info.value)
    assert "\n" not in message
    assert "'toy' stopped at step 6: fit = nan." in message
    assert "small" not in message
    assert "toy.safetensors" in message
    assert "method.lr" in message
    assert step_of(tmp_path / "checkpoints" / "toy.safetensors") == 4


def test_without_a_checkpoint_none_is_spoken_of():
    with pytest.raises(ErasekitError) as info:
        run(nan_at=0)
    assert "checkpoint" not in str(info.value)


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path):
    parameters = fresh()

    def losses(batch, generator):
        slope = parameters[1].sub(parameters[1].detach()).square().sum().sqrt()  # 0, with a gradient of 0 / 0
        return {"fit": parameters[0].square().mean(), "edge": slope if batch == 7 else slope.detach()}

    with pytest.raises(ErasekitError, match="step 7: gradient = nan"):
        train(losses, parameters, CONFIG, ctx=context(tmp_path), name="toy")
    assert all(p.isfinite().all() for p in parameters)
    assert step_of(tmp_path / "checkpoints" / "toy.safetensors") == 4


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_checkpoint_is_ignored(tmp_path, keep):
    whole = run(tmp_path)
    path = tmp_path / "checkpoints" / "toy.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    again = run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert step_of(path) == 12
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_parameters_without_a_gradient_are_unchanged():
    """Neither decay nor old moments may move them."""
    parameters = fresh()
    seen = []

    def losses(batch, generator):
        seen.append([p.detach().clone() for p in parameters])
        return {"turn": parameters[batch % 2].square().sum()}

    train(losses, parameters, CONFIG, ctx=context(), name="toy")
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        assert not torch.equal(before[step % 2], after[step % 2])
        assert torch.equal(before[1 - step % 2], after[1 - step % 2])


@pytest.mark.parametrize("clip", [1e-2, 1e6])
def test_accumulated_batches_equal_one_large_batch(clip):
    """The mean over the batches, so that neither rate nor clipping depends on how a batch is cut."""
    config = CONFIG.model_copy(update={"clip": clip, "steps": 5})
    data = torch.randn(15, 4, 3, generator=torch.Generator().manual_seed(1))
    results = []
    for accumulate in (3, 1):
        parameters = [p.detach().double().requires_grad_() for p in fresh()]

        def losses(batch, generator, n=3 // accumulate, w=parameters):
            x = data[batch * n : (batch + 1) * n].flatten(0, 1).double()
            return {"fit": (x @ w[0] - w[1]).square().mean()}

        train(losses, parameters, config.model_copy(update={"accumulate": accumulate}), ctx=context(), name="toy")
        results.append(parameters)
    for cut, large in zip(*results, strict=True):
        torch.testing.assert_close(cut, large, rtol=1e-12, atol=1e-12)


def test_the_first_step_is_adamw_by_hand():
    config = TrainingConfig(steps=1, lr=0.1, warmup=4, weight_decay=0.5)
    p = torch.nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    train(lambda batch, generator: {"square": p.square().sum()}, [p], config, ctx=context(), name="toy")
    rate = 0.1 / 5  # the first of four steps of warm-up
    expected = torch.tensor([2.0, -3.0], dtype=torch.float64) * (1 - rate * 0.5) - rate * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(p.detach(), expected, rtol=1e-7, atol=0)  # at first the moments give the sign


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_constant_rate_stays_after_the_warm_up(warmup):
    config = TrainingConfig(steps=8, lr=0.1, schedule="constant", warmup=warmup, clip=0.0)
    p, seen = torch.nn.Parameter(torch.tensor([50.0], dtype=torch.float64)), []

    def losses(batch, generator):
        seen.append(p.item())
        return {"slope": 1000 * p.sum()}  # a constant gradient: every step of Adam is the rate itself

    train(losses, [p], config, ctx=context(), name="toy")
    steps = [a - b for a, b in itertools.pairwise([*seen, p.item()])]
    assert steps == pytest.approx([0.1 * min(1, (k + 1) / (warmup + 1)) for k in range(8)], rel=1e-6)


@pytest.mark.parametrize(("clip", "factor"), [(0.0, 1.0), (2.0, 0.2), (100.0, 1.0)])
def test_the_gradient_is_clipped_to_a_norm_or_not_at_all(clip, factor):
    p, config = torch.nn.Parameter(torch.zeros(2)), TrainingConfig(steps=1, clip=clip)
    train(lambda batch, generator: {"slope": 6 * p[0] + 8 * p[1]}, [p], config, ctx=context(), name="toy")
    torch.testing.assert_close(p.grad, factor * torch.tensor([6.0, 8.0]), rtol=1e-4, atol=0)


def test_no_steps_change_nothing(tmp_path):
    assert all(torch.equal(a, b) for a, b in zip(run(tmp_path, CONFIG.model_copy(update={"steps": 0})), fresh(), strict=True))
    assert not (tmp_path / "checkpoints").exists()
