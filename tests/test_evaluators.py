import math

import numpy as np
import pytest
import torch
from PIL import Image

from erasekit.concepts import Concept
from erasekit.errors import ErasekitError
from erasekit.evaluation.distances import FrechetEvaluator, frechet, statistics
from erasekit.evaluation.evaluate import evaluate
from erasekit.evaluation.evaluators import Evaluator, Scores
from erasekit.evaluation.intervals import bootstrap, harmonic_mean, wilson
from erasekit.evaluation.results import Metric
from erasekit.evaluation.tasks import Prompt, Task

CAT = Concept(name="cat", phrases=("a cat",))


def gaussian(d: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return statistics(torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + seed)


@pytest.mark.parametrize("n", [500, 5])  # with 5 images the covariance is singular
def test_frechet_against_the_eigenvalues_of_the_product(n):
    (m1, c1), (m2, c2) = gaussian(8, n, 1), gaussian(8, n, 2)
    eigenvalues = np.linalg.eigvals(c1.numpy() @ c2.numpy())  # not symmetric: real and not negative in exact arithmetic
    root = np.sqrt(np.clip(eigenvalues.real, 0, None)).sum()
    expected = ((m1 - m2) ** 2).sum().item() + np.trace(c1.numpy()) + np.trace(c2.numpy()) - 2 * root
    assert frechet(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-6)
    assert frechet(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_commuting_gaussians_and_of_a_set_with_itself():
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 0.0, 1.0])
    zero = torch.zeros(3)
    expected = ((a.sqrt() - b.sqrt()) ** 2).sum().item() + 3.0
    assert frechet(zero, a.diag(), zero + 1, b.diag()) == pytest.approx(expected, rel=1e-12)
    mean, cov = gaussian(6, 50, 3)
    assert frechet(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-8)


def test_statistics_are_the_textbook_ones():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    mean, cov = statistics(x)
    assert mean.numpy() == pytest.approx(x.double().numpy().mean(0), rel=1e-12)
    assert cov.numpy() == pytest.approx(np.cov(x.double().numpy(), rowvar=False), rel=1e-10)


@pytest.mark.parametrize(("k", "n"), [(0, 50), (3, 50), (49, 50), (50, 50), (1, 1)])
def test_wilson_ends_solve_the_score_equation(k, n):
    for end in wilson(k / n, n):
        assert (k / n - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, abs=1e-12)


def test_wilson_known_values():
    assert wilson(0.0, 50) == pytest.approx((0.0, 0.07135), abs=1e-5)
    assert wilson(0.5, 0) == (0.0, 1.0)
    assert max(wilson(1.0, n)[1] for n in range(1, 100)) == 1.0  # rounding would lead some beyond
    assert min(wilson(0.0, n)[0] for n in range(1, 100)) == 0.0


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval_and_repeats():
    scores = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap([scores], lambda groups: float(groups[0].mean()))
    half = 1.96 * scores.std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.05)
    assert (low, high) == bootstrap([scores], lambda groups: float(groups[0].mean()))
    assert (low, high) != bootstrap([scores], lambda groups: float(groups[0].mean()), seed=1)


def test_the_bootstrap_resamples_groups_on_their_own():
    groups = [np.zeros(5), np.ones(9)]
    assert bootstrap(groups, lambda g: float(len(g[0]) + g[1].mean() - g[0].mean())) == (6.0, 6.0)


def test_the_bootstrap_draws_every_score_and_takes_the_middle_95_percent():
    scores = np.arange(3.0)
    means = sorted((a + b + c) / 3 for a in scores for b in scores for c in scores)  # all 27 resamples, each as likely
    low, high = bootstrap([scores], lambda groups: float(groups[0].mean()), draws=20_000)
    assert (low, high) == pytest.approx((means[0], means[-1]))
    assert bootstrap([np.arange(100.0)], lambda groups: float(groups[0].min()))[0] == 0.0
    counted = []

    def count(groups):
        counted.append(len(groups[0]))
        return float(len(counted))

    assert bootstrap([scores], count) == pytest.approx((1 + 0.025 * 999, 1 + 0.975 * 999))
    assert counted == [3] * 1000


def test_harmonic_mean():
    assert harmonic_mean(0.5, 1.0, 1.0) == pytest.approx(0.75)
    assert harmonic_mean(0.0, 1.0) == 0.0
    assert harmonic_mean(1 - 0.0849, 0.9735, 1 - 0.1053) == pytest.approx(0.9266, abs=1e-4)  # MACE's ten-class averages


class Redness(Evaluator):
    """Says "shown" where the red channel is bright; fails on images with a green top left corner."""

    name = "redness"
    version = "3"

    def __init__(self) -> None:
        self.rows, self.batches = [], []

    def describe(self):
        return {"model": "mean", "version": self.version, "sha256": ""}

    def update(self, batch):
        if (batch.images[:, 1, 0, 0] > 200).any():
            raise RuntimeError("green")
        self.batches.append(len(batch.prompts))
        self.rows += [{"shown": bool(p[0].float().mean() > 100), "side_seen": batch.side} for p in batch.images]

    def compute(self):
        return Scores(self.rows)


class Moments(FrechetEvaluator):
    name = "moments"
    features_name = "mean-rgb"

    def features(self, images):
        return images.double().mean((2, 3))

    def reference(self):
        return torch.zeros(3), torch.eye(3)


class Reds(Task):
    name = "reds"
    domain = "mini"

    def aggregate(self, rows, concepts):
        share = {side: float(np.mean([r["shown"] for r in rows[side]])) for side in ("base", "erased")}
        fields = {"value": share["erased"], "base": share["base"], "n": len(rows["erased"])}
        return {"acc_e": Metric(**fields, higher_is_better=False, evaluator="redness")}


def images(folder, colours) -> list:
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(len(colours))]
    for path, colour in zip(paths, colours, strict=True):
        Image.new("RGB", (4, 4), colour).save(path)
    return paths


@pytest.fixture
def both(tmp_path):
    """Base: all red; erased: red, blue, green (the judge fails on it), blue, unreadable, blue."""
    base = images(tmp_path / "base", ["red"] * 6)
    erased = images(tmp_path / "erased", ["red", "blue", (0, 255, 0), "blue", "blue", "blue"])
    erased[4].write_bytes(b"\x89PNG")
    return base, erased


PROMPTS = [Prompt(f"prompt {i}", i, "red", "clean" if i > 2 else "erase", "cat") for i in range(6)]


def test_failures_are_counted_and_are_never_taken_for_absent(both):
    rows, metrics, counts = evaluate(Reds(), [Redness()], PROMPTS, *both, concepts=[CAT], batch=4)
    assert counts == {"images": 12, "scored": 10, "failed": 2, "no_face": 0}
    assert [r["index"] for r in rows if r["failed"]] == [2, 4]
    assert metrics["acc_e"].value == pytest.approx(1 / 4)  # of the four scored ones; 1/6 would count failures as absent
    assert metrics["acc_e"].base == 1.0
    assert metrics["acc_e"].evaluator == "redness@3"


def test_rows_belong_to_their_images(both):
    rows, _, _ = evaluate(Reds(), [Redness()], PROMPTS, *both, concepts=[CAT], batch=4)
    assert [(r["side"], r["file"]) for r in rows] == [(side, f"{i}.png") for side in ("base", "erased") for i in range(6)]
    assert all(r["side"] == r["side_seen"] for r in rows if not r["failed"])
    assert [r.get("shown") for r in rows[6:]] == [True, False, None, False, None, False]
    assert rows[7] | {"shown": None} == {
        **{"index": 1, "prompt": "prompt 1", "seed": 1, "set": "erase", "label": "red", "concept": "cat"},
        **{"side": "erased", "file": "1.png", "failed": False, "shown": None, "side_seen": "erased"},
        **{"seen": [], "score": None, "no_face": False, "judge": "redness"},
    }


def test_numbers_do_not_depend_on_the_batches(both):
    several = [evaluate(Reds(), [Redness(), Moments()], PROMPTS, *both, concepts=[CAT], batch=n) for n in (1, 4, 64)]
    assert several[0] == several[1] == several[2]


def test_an_evaluator_that_fails_on_everything_is_an_error(both, tmp_path):
    green = images(tmp_path / "green", [(0, 255, 0)] * 6)
    with pytest.raises(ErasekitError, match="'redness' failed on every image: green"):
        evaluate(Reds(), [Redness()], PROMPTS, green, green, concepts=[CAT])


def test_two_evaluators_may_not_give_the_same_score(both):
    class Twin(Redness):
        name = "twin"

    with pytest.raises(ErasekitError, match="'twin' gives the score side_seen, which another one gives"):
        evaluate(Reds(), [Redness(), Twin()], PROMPTS, *both, concepts=[CAT])


def test_frechet_on_clean_images_only(both):
    base, _ = both
    _, metrics, counts = evaluate(Reds(), [Redness(), Moments()], PROMPTS, base, base, concepts=[CAT])
    same, reference = metrics["frechet[mean-rgb]"], metrics["frechet[mean-rgb/reference]"]
    assert counts["failed"] == 0
    assert same.value == pytest.approx(0.0, abs=1e-9)
    assert same.n == 3
    assert same.base is None
    # all images are (255, 0, 0): no covariance, so the distance is 255^2 + tr(I)
    assert reference.value == pytest.approx(255**2 + 3)
    assert reference.base == reference.value
    assert same.evaluator == "moments@1"


def test_frechet_of_too_few_images_is_not_a_number(both):
    base, _ = both
    _, metrics, _ = evaluate(Reds(), [Redness(), Moments()], PROMPTS[:4], base[:4], base[:4], concepts=[CAT])
    assert metrics["frechet[mean-rgb]"].value is None
