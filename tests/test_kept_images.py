"""Images are drawn once and judged once, whoever asks: counted where they are drawn and where they are looked at."""

import pytest

from erasekit.evaluation import sampling
from erasekit.evaluation.kept_scores import KeptScores, score_key
from erasekit.evaluation.results import read_scores
from erasekit.evaluation.tasks import Prompt
from erasekit.registration import plugins
from erasekit.runs.config import build
from erasekit.runs.ready import evaluation_prompts
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from erasekit.testing.world import Red
from tests.conftest import THIRD_PARTY

PIXELS = Prompt("a photo of a cat", 0, "cat", "erase", "cat")


@pytest.fixture
def registries(world):
    return plugins.load([world, THIRD_PARTY / "single_file_method.py"])


@pytest.fixture
def configured(tiny_folder):
    def config(*overrides, **flags):
        names = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
        settings = [f"backbone.path={tiny_folder}", "backbone.device=cpu", *overrides]
        return build({**names, **flags}, overrides=settings)

    return config


@pytest.fixture
def drawn(monkeypatch):
    """How many images each call of the pipeline drew that nobody had: by the folder that keeps them."""
    counts, save = {}, sampling.replacing

    def counted(path):
        if path.suffix == ".png":
            counts[path.parent.parent.name] = counts.get(path.parent.parent.name, 0) + 1
        return save(path)

    monkeypatch.setattr(sampling, "replacing", counted)
    return counts


@pytest.fixture
def looked_at(registries, monkeypatch):
    """How many images the judge was shown."""
    counts, judge = [], registries.evaluators.get("red")
    update = judge.update
    monkeypatch.setattr(judge, "update", lambda self, batch: counts.append(len(batch.prompts)) or update(self, batch))
    return counts


def test_two_concepts_and_two_methods_draw_the_unedited_model_once(registries, configured, drawn, looked_at, tmp_path):
    config = configured(concepts=())
    run(config, out=tmp_path, registries=registries)
    prompts = [p for plan in resolve(config, registries).singles() for p in evaluation_prompts(plan)]
    different = {(p.text, p.seed) for p in prompts}
    assert (len(prompts), len(different)) == (10, 6)  # a ship and three clean ones are asked for by both
    assert drawn == {"base": 6, "erased": 10}
    run(configured(concepts=(), method="direction"), out=tmp_path, registries=registries)
    assert drawn == {"base": 6, "erased": 20}
    assert sum(looked_at) == 6 + 20


def test_a_run_measured_in_another_way_draws_and_judges_what_is_missing(registries, configured, drawn, looked_at, tmp_path):
    first = run(configured("method.steps=1", limit=1), out=tmp_path, registries=registries)
    erasure = path_of(tmp_path, resolve(configured("method.steps=1", limit=1), registries)) / "erasure"
    assert (drawn, sum(looked_at)) == ({"base": 3, "erased": 3}, 6)
    again = run(configured("method.steps=1"), out=tmp_path, registries=registries, erasure=erasure)
    assert again.protocol["hash"] != first.protocol["hash"]
    assert (drawn, sum(looked_at)) == ({"base": 5, "erased": 5}, 10)
    alone = run(configured("method.steps=1"), out=tmp_path / "alone", registries=registries, erasure=erasure)
    assert alone.metrics == again.metrics
    other = run(configured("method.steps=1", "protocol.steps=1"), out=tmp_path, registries=registries, erasure=erasure)
    assert other.protocol["hash"] != again.protocol["hash"]
    assert drawn == {"base": 15, "erased": 15}


def test_a_kept_score_is_of_these_bytes_asked_for_this(tmp_path):
    image, kept, judge = tmp_path / "a.png", KeptScores(tmp_path / "scores"), Red()
    image.write_bytes(b"some bytes")
    key = score_key(image, PIXELS)
    kept.add(judge, {key: {"red": 1.0, "shown": True}})
    assert kept.of(judge) == {key: {"red": 1.0, "shown": True}}
    assert score_key(image, PIXELS._replace(label="dog")) != key
    assert score_key(tmp_path / "none.png", PIXELS) == ""
    image.write_bytes(b"other bytes")
    assert score_key(image, PIXELS) not in kept.of(judge)
    judge.version = "2"
    assert kept.of(judge) == {}


def test_a_line_that_was_cut_short_is_no_score(tmp_path):
    kept, judge = KeptScores(tmp_path), Red()
    kept.add(judge, {"a": {"red": 1.0}, "b": {"red": 0.0}})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    assert kept.of(judge) == {"a": {"red": 1.0}}
    kept.add(judge, {"c": {"red": 0.5}})
    assert kept.of(judge) == {"a": {"red": 1.0}, "c": {"red": 0.5}}


def test_an_image_that_failed_is_looked_at_again(registries, configured, looked_at, tmp_path):
    config = configured("method.steps=1")
    run(config, out=tmp_path, registries=registries)
    path = path_of(tmp_path, resolve(config, registries))
    rows = [r for r in read_scores(path / "scores.parquet") if r["side"] == "erased"]
    (path / "images" / "erased" / rows[0]["file"]).write_bytes(b"broken")
    (path / "results.json").unlink()
    run(config, out=tmp_path, registries=registries)
    assert sum(looked_at) == 10  # it is drawn again as it was, and known
    assert [r for r in read_scores(path / "scores.parquet") if r["side"] == "erased"] == rows


@pytest.mark.parametrize(
    ("backbone", "overrides", "drawn_as"),
    [
        ("sd15", [], (9.0, 768, 512)),
        ("sd15", ["protocol.guidance=7.5"], (None, 768, 512)),
        ("sd15", ["protocol.size=256"], (9.0, None, None)),
        ("flux", [], (None, None, None)),
    ],
)
def test_what_a_prompt_says_gives_way_to_the_backbone_and_the_user(backbone, overrides, drawn_as, tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\na red house,7,9,768,512\n")
    settings = [f"task.sets.erase.csv={file}", "task.profile=offline", *overrides]
    plan = resolve(
        build({"method": "uce", "backbone": backbone, "task": "i2p", "limit": 1}, overrides=settings), plugins.default()
    )
    first = evaluation_prompts(plan)[0]
    assert (first.text, first.seed, first.guidance, first.width, first.height) == ("a red house", 7, *drawn_as)
