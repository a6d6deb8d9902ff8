"""`erasekit evaluate --matrix`: each concept is erased in turn, all are measured, and finished runs are used again."""

import json
import os
import re
from pathlib import Path

import pytest

from erasekit.cli import main
from erasekit.cli.matrix import heat
from erasekit.evaluation.curves import Interference
from erasekit.evaluation.interference import interference_of
from erasekit.evaluation.results import read_result, read_scores, write_scores
from erasekit.runs.pages.comparison import Compared, write_comparison
from erasekit.runs.pages.heat import MOST_CELLS, heat_map
from tests.test_comparison import run
from tests.test_report import Reader

ROOT = Path(__file__).parents[1]
ASKED = {"cat": "feline", "dog": "dog", "ship": "ship"}  # concept -> label
TABLE = re.compile(r'<table class="heat">.*?</table>', re.DOTALL)


def rows_of(erased, gone, *, broken=(), seeds=2):
    """The scored rows of a run: what is erased is asked for by its concept, the rest by its label."""
    return [
        {
            **{
                "prompt": f"a {name}",
                "seed": seed,
                "label": label,
                "side": side,
                "failed": side == "erased" and name in broken,
            },
            **{"set": "erase" if name == erased else "preserve", "concept": name if name == erased else ""},
            "shown": side == "base" or name not in gone,
        }
        for side in ("base", "erased")
        for name, label in ASKED.items()
        for seed in range(seeds)
    ]


def test_a_row_for_each_erasure_and_a_column_for_each_thing():
    found = interference_of({"dog": rows_of("dog", {"dog"}), "cat": rows_of("cat", {"cat", "dog"}, broken={"ship"})})
    assert found.erased == ("dog", "cat")
    assert found.asked == ("dog", "cat", "ship"), "a label is called like the concept that another run erases"
    assert found.values == ((0.0, 1.0, 1.0), (0.0, 0.0, None)), "a failed image is in no share"
    assert found.images == ((2, 2, 2), (2, 2, 0))
    assert found.base == (1.0, 1.0, 1.0)


def test_the_bases_images_of_several_runs_count_once():
    both, one = ([row | {"shown": row["seed"] == 0} for row in rows_of("dog", {"dog"}, seeds=seeds)] for seeds in (2, 1))
    assert interference_of({"dog": both, "cat": one}).base == (0.5, 0.5, 0.5)
    unjudged = [row | {"shown": None} for row in both]
    assert interference_of({"dog": unjudged}).asked == ()


@pytest.fixture
def two(tmp_path):
    """Two runs of one row: images of cats and dogs under both."""
    found = []
    for erased in ("cat", "dog"):
        folder, task = run(tmp_path / erased, left=0.1, stayed=0.8, concepts=(erased,), protocol={"hash": erased})
        rows = read_scores(folder / "scores.parquet")
        for row in rows:
            own = row["label"] == erased
            row |= {"set": "erase" if own else "preserve", "concept": erased if own else ""}
        write_scores(rows, folder / "scores.parquet")
        found.append(Compared("uce", folder, task, read_result(folder / "results.json")))
    return found


def test_a_page_of_several_concepts_has_the_matrix_as_a_table(two, tmp_path):
    page = write_comparison(two, tmp_path / "page.html").read_text()
    (table,) = TABLE.findall(page)
    assert re.findall(r'<th scope="col">(\w+)</th>', table) == ["erased", "cat", "dog"]
    assert re.findall(r'<th scope="row">([^<]+)</th>', table) == ["nothing (base)", "cat", "dog"]
    assert len(re.findall(r'<td class="h\d+ own">', table)) == 2
    assert '<a href="#interference-1">' in page
    assert "It rests on" in page
    assert all(link.startswith(("data:image/webp;base64,", "#")) for link in Reader(page).links)
    assert not TABLE.findall(write_comparison(two[:1] * 2, tmp_path / "one.html").read_text()), "one concept is no matrix"


def test_a_matrix_too_large_for_a_page_is_left_out():
    names = tuple(map(str, range(MOST_CELLS)))
    assert heat_map(Interference(erased=("a",), asked=names, values=((1.0,) * len(names),)))
    assert not heat_map(Interference(erased=("a", "b"), asked=names, values=((1.0,) * len(names),) * 2))


@pytest.mark.parametrize(("width", "named"), [(200, True), (60, False)])
def test_names_are_numbers_where_the_terminal_is_narrow(width, named, monkeypatch, capsys):
    names = ("airplane", "automobile", "a winged creature", "Vincent van Gogh", "horse", "truck")
    values = tuple(tuple(float(i != k) for k in range(6)) for i in range(6))
    monkeypatch.setattr("erasekit.cli.tables.WIDTH_OF_A_FILE", width)
    heat(Interference(erased=names, asked=names, values=values, base=(1.0,) * 5 + (None,)), title="Title")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert out.count("0.00*") == 6
    assert ("5 horse" in out) is not named
    assert re.search(r"nothing +1\.00 .* -\s", out)


FLAGS = ["evaluate", "--matrix", "-m", "pull", "-t", "words", "--limit", "2"]


@pytest.fixture
def tiny(world, tiny_folder, tmp_path, monkeypatch):
    """The flags of a matrix in the tiny world."""
    paths = [str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.chdir(tmp_path)
    short = ["method.steps=2", f"backbone.path={tiny_folder}", "backbone.device=cpu", "protocol.steps=2", "protocol.size=16"]
    return [*FLAGS, "-b", "tiny", "--plugin", str(world), *(word for s in short for word in ("-s", s))]


def test_every_concept_in_turn_and_nothing_twice(tiny, tmp_path, capsys):
    assert main([*tiny, "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert found["erased"] == ["cat", "dog"]
    assert found["asked"] == ["cat", "dog", "ship"]
    assert found["images"] == [[1, 0, 1], [0, 1, 1]], "the tiny world keeps one thing"
    results = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/tiny/**/results.json")}
    assert {str(path.parent.relative_to(tmp_path)) for path in results} == set(found["runs"].values())
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert Interference.read(folder / "interference.json").model_dump(mode="json").items() <= found.items()
    assert "<h2>Interference</h2>" in (folder / "comparison.html").read_text()
    drawn = sorted(tmp_path.glob("runs/cache/base/*/*.png"))
    assert main(tiny) == 0
    shown = capsys.readouterr().out
    assert "* is what the row erased" in shown
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert sorted(tmp_path.glob("runs/cache/base/*/*.png")) == drawn


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["somewhere"], "--matrix makes erasures of its own, given 'somewhere'"),
        (["--force"], "use another --out in place of --force"),
        (["-c", "cat"], "needs two concepts or more, given 'cat' alone"),
        (["-c", "cat", "-c", "cat"], "'cat' is given twice"),
        (["-c", "cat", "-c", "unicorn"], "Unknown concept 'unicorn'"),
        (["-s", "method.stepz=2"], "stepz"),
    ],
)
def test_wrong_use_is_a_line_before_anything_is_made(more, told, tiny, tmp_path, capsys):
    assert main([*tiny, *more]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_judges_nothing_has_no_matrix(capsys):
    flags = ["evaluate", "--matrix", "-m", "uce", "-b", "sd15", "-t", "free", "-c", "a cat", "-c", "a dog"]
    assert main(flags) == 2
    assert "judges nothing" in capsys.readouterr().err


def test_without_the_matrix_an_erasure_is_needed_and_says_what_made_it(capsys, tmp_path):
    assert main(["evaluate"]) == 2
    assert "Give the folder of an erasure, or --matrix" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "-m", "uce", "-c", "cat"]) == 2
    assert "Leave --method and --concept out" in capsys.readouterr().err
