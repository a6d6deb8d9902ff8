"""Rows of tables: means over concepts and seeds, their intervals, and differences between rows."""

import json
from pathlib import Path

import pytest

from erasekit.evaluation.results import Metric, RunResult, write_result
from erasekit.evaluation.summary import differences, interval, summary
from erasekit.sweeps.cells import Cell
from erasekit.sweeps.table import by_concept, by_difference, by_row, markdown, runs_of, tables_of

ROOT = Path(__file__).parents[1]


def shares(*values):
    return [
        Metric(value=v, ci95=(max(0.0, v - 0.1), min(1.0, v + 0.1)), n=20, higher_is_better=False, evaluator="x@1")
        for v in values
    ]


def result_of(concept, seed, sha256, *, value=None, protocol="x", method="m"):
    metrics = {"acc_e": shares(0.1 * seed if value is None else value)[0]}
    named = {
        "method": method,
        "backbone": "b",
        "task": "t",
        "domain": "mini",
        "config_hash": "x",
        "protocol": {"hash": protocol},
    }
    cost = {"counts": {}, "timings_s": {"erase": 1.0}, "peak_memory_mb": 1.0}
    return RunResult(**named, **cost, concepts=(concept,), seed=seed, metrics=metrics, erasure_sha256=sha256)


def test_seeds_that_agree_do_not_narrow_an_interval():
    once = [shares(v) for v in (0.0, 0.1, 0.4)]
    assert interval([runs * 3 for runs in once]) == interval(once)


def test_an_interval_is_no_narrower_than_the_runs_own_and_covers_the_spread_of_concepts():
    low, high = interval([shares(0.5)] * 4)  # all agree: the mean of four independent intervals of 0.1
    assert (low, high) == pytest.approx((0.45, 0.55), abs=1e-4)
    low, high = interval([shares(v) for v in (0.0, 0.0, 1.0, 1.0)])
    assert low <= 0.1
    assert high >= 0.9


def test_seeds_of_a_closed_form_are_one_run():
    same = {c: [result_of(c, 0, c) for _ in range(3)] for c in ("cat", "dog")}
    other = {c: [result_of(c, seed, f"{c}{seed}") for seed in range(3)] for c in ("cat", "dog")}
    closed, trained = summary(same)["metrics"]["acc_e"], summary(other)["metrics"]["acc_e"]
    assert (closed["runs"], closed["images"]) == (2, 40)
    assert (trained["runs"], trained["images"]) == (6, 120)
    row = {"runs": [{"concepts": r.concepts[0], "erasure_sha256": r.erasure_sha256} for runs in same.values() for r in runs]}
    assert runs_of(row) == "2 (3 seeds alike)"
    row = {"runs": [{"concepts": r.concepts[0], "erasure_sha256": r.erasure_sha256} for runs in other.values() for r in runs]}
    assert runs_of(row) == "6"


def test_differences_are_taken_seed_by_seed_over_what_both_rows_have():
    one = {c: [result_of(c, s, f"{c}{s}", value=v + s / 10) for s in (0, 1)] for c, v in (("cat", 0.3), ("dog", 0.5))}
    other = {c: [result_of(c, s, f"o{c}{s}", value=0.1 + s / 10) for s in (0, 1)] for c in ("cat", "dog", "ship")}
    found = differences(one, other)["acc_e"]
    assert found["mean"] == pytest.approx(0.3)
    assert found["concepts"] == 2
    assert found["ci95"] == pytest.approx([0.2, 0.4])  # of two concepts: from one's to the other's
    assert differences({"cat": one["cat"]}, other)["acc_e"]["ci95"] is None
    assert differences(one, {"ship": other["ship"]}) == {}
    drawn_otherwise = {c: [r.model_copy(update={"protocol": {"hash": "y"}}) for r in runs] for c, runs in other.items()}
    assert differences(one, drawn_otherwise) == {}


def test_a_single_run_is_compared_with_every_seed_of_the_other_row():
    closed = {"cat": [result_of("cat", 0, "c", value=0.5)]}
    trained = {"cat": [result_of("cat", s, f"t{s}", value=v) for s, v in ((0, 0.2), (1, 0.4))]}
    assert differences(closed, trained)["acc_e"]["mean"] == pytest.approx(0.2)
    assert differences(trained, closed)["acc_e"]["mean"] == pytest.approx(-0.2)


def test_a_share_of_exactly_the_limit_counts_as_erased_however_many_seeds():
    """The mean of three times 0.2 is a little more than 0.2 in floating point."""
    metric = {"mean": 0.2, "ci95": [0.1, 0.3], "base": 1.0}
    runs = [{"concepts": "cat", "acc_e": 0.2}] * 3 + [{"concepts": "dog", "acc_e": 0.25}] * 3
    row = {"metrics": {"acc_e": metric}, "runs": runs, "erase_s": 1.0, "file_kb": 1.0, "peak_memory_mb": 1.0}
    assert "1 of 2" in by_row({"sld": row}).rows[0]


def test_tables_hold_rows_of_one_protocol_and_those_of_another_stand_apart(tmp_path):
    cells = []
    for row, protocol in (("a", "x"), ("b", "x"), ("c", "y")):
        for concept in ("cat", "dog"):
            for seed in (0, 1):
                path = f"b/t/{row}/{concept}{seed}"
                result = result_of(concept, seed, f"{row}{concept}{seed}", protocol=protocol, method=row)
                (tmp_path / path).mkdir(parents=True)
                write_result(result, tmp_path / path / "results.json")
                cells.append(Cell(row, {}, path))
    cells.append(Cell("a", {}, "b/t/a/not-there"))
    tables = tables_of(cells, tmp_path)
    assert [list(table["rows"]) for table in tables] == [["a", "b"], ["c"]]
    assert "differences" not in tables[0]["rows"]["a"]
    assert [row[0] for row in by_row(tables[0]["rows"]).rows] == ["a", "b", "unedited"]
    assert by_difference(tables[0]["rows"]).rows[0][:2] == ["b", "+0.000 (+0.000 to +0.000)"]
    assert by_difference(tables[1]["rows"]).rows == []


def test_a_row_whose_seeds_were_measured_by_two_protocols_is_no_mean_of_both(tmp_path):
    cells = []
    for row, seed, protocol in (("a", 0, "x"), ("a", 1, "y"), ("b", 0, "y"), ("b", 1, "y"), ("c", 0, "x")):
        path = f"{row}{seed}"
        (tmp_path / path).mkdir()
        write_result(result_of("cat", seed, path, protocol=protocol, method=row), tmp_path / path / "results.json")
        cells.append(Cell(row, {}, path))
    tables = [table["rows"] for table in tables_of(cells, tmp_path)]
    seeds = [{name: [run["seed"] for run in row["runs"]] for name, row in rows.items()} for rows in tables]
    assert seeds == [{"a": [0], "c": [0]}, {"a": [1], "b": [0, 1]}]


def test_a_row_says_what_its_erasures_leave_and_move_by_predictions(tmp_path):
    """Of two concepts the larger residual each; of an erasure that was not measured, or is damaged, nothing."""
    said = {
        "a/cat": {"residual": {"cat": {"prompts": 0.1, "other_words": 0.3}}, "drift": 0.2},
        "a/dog": {"residual": {"dog": {"prompts": 0.1, "other_words": None}}, "drift": 0.4},
        "b/cat": {"residual": {"cat": {"prompts": None, "other_words": None}}, "drift": None},
        "b/dog": {},
        "c/cat": "cut",
    }
    cells = []
    for path, manifest in said.items():
        row, concept = path.split("/")
        (tmp_path / path / "erasure").mkdir(parents=True)
        (tmp_path / path / "erasure" / "erasure.json").write_text(json.dumps(manifest))
        (tmp_path / path / "erasure" / "guidance.json").write_bytes(b"0" * 500)
        write_result(result_of(concept, 0, path, method=row), tmp_path / path / "results.json")
        cells.append(Cell(row, {}, path))
    rows = tables_of(cells, tmp_path)[0]["rows"]
    assert (rows["a"]["residual"], rows["a"]["drift"], rows["a"]["file_kb"]) == pytest.approx((0.2, 0.3, 0.5))
    assert not {"residual", "drift"} & (rows["b"].keys() | rows["c"].keys()), "a damaged file costs no table"
    columns, (a, b, *_) = by_row(rows)
    assert [a[columns.index(name)] for name in ("residual", "drift")] == ["0.20", "0.30"]
    assert [b[columns.index(name)] for name in ("residual", "drift")] == ["", ""]


TABLES = [p for p in sorted((ROOT / "benchmarks" / "results").glob("*.json")) if "rows" in json.loads(p.read_text())]


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_every_committed_table_is_printed_with_every_row_and_concept(path):
    """That of the ablations has no sizes of files."""
    rows = json.loads(path.read_text())["rows"]
    lines = markdown(by_row(rows)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in (*rows, "unedited")]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    first = next(iter(rows.values()))
    concepts = by_concept(first).rows
    assert len(concepts) == len({run["concepts"] for run in first["runs"]}) + 2
