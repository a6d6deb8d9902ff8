import itertools
import json
import math

import pytest
from pydantic import ValidationError

from erasekit.errors import UsageError
from erasekit.evaluation.results import (
    Metric,
    RunResult,
    compare,
    mean_over_concepts,
    number,
    read_result,
    read_scores,
    table,
    write_result,
    write_scores,
)


def metric(value=0.02, **changes) -> Metric:
    fields = {"base": 0.97, "ci95": (0.0, 0.05), "n": 200, "higher_is_better": False, "evaluator": "judge@1"}
    return Metric(value=value, **fields | changes)


def result(concept="cat", *, value=0.02, protocol="abcdef01", **changes) -> RunResult:
    fields = {
        "method": "trace",
        "backbone": "sd15-mini",
        "task": "objects",
        "domain": "mini",
        "concepts": (concept,),
        "seed": 0,
        "config_hash": f"hash-{concept}",
        "protocol": {"steps": 15, "hash": protocol},
        "counts": {"images": 10, "scored": 9, "failed": 1, "no_face": 0},
        "metrics": {"acc_e": metric(value, ci95=(value - 0.01, value + 0.03))},
        "timings_s": {"load": 1.5},
        "peak_memory_mb": 900.0,
        "erasure_sha256": f"sha-{concept}",
    }
    return RunResult(**fields | changes)


def test_results_have_exactly_the_keys_of_the_schema(tmp_path):
    write_result(result(), tmp_path / "results.json")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert list(stored) == [
        *("schema_version", "method", "backbone", "task", "domain", "concepts", "seed", "config_hash", "protocol"),
        *("counts", "metrics", "timings_s", "peak_memory_mb", "erasure_sha256", "warnings"),
    ]
    assert list(stored["metrics"]["acc_e"]) == ["value", "base", "ci95", "n", "higher_is_better", "evaluator", "meaning"]
    assert stored["schema_version"] == 1
    assert read_result(tmp_path / "results.json") == result()
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 2}', "\x00"])
def test_a_file_that_is_no_result_is_one_line(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        read_result(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="No such file"):
        read_result(tmp_path / "none.json")


def test_what_is_not_a_number_or_not_in_the_schema_is_refused():
    with pytest.raises(ValidationError):
        metric(math.nan)
    with pytest.raises(ValidationError):
        result(extra=1)
    with pytest.raises(ValidationError, match="hash"):
        RunResult(**result().model_dump() | {"protocol": {"steps": 3}})


def test_the_mean_over_concepts_and_its_interval():
    parts = [result("cat", value=0.0), result("dog", value=0.1), result("ship", value=0.2)]
    mean = mean_over_concepts(parts)
    found = mean.metrics["acc_e"]
    assert found.value == pytest.approx(0.1)
    assert found.base == pytest.approx(0.97)
    assert found.n == 600
    # half-widths of independent estimates add as squares
    assert found.ci95 == pytest.approx((0.1 - math.sqrt(3) * 0.01 / 3, 0.1 + math.sqrt(3) * 0.03 / 3))
    assert mean.concepts == ("cat", "dog", "ship")
    assert mean.counts == {"images": 30, "scored": 27, "failed": 3, "no_face": 0}
    assert mean.timings_s == {"load": 4.5}


def test_the_mean_of_one_run_is_that_run():
    mean = mean_over_concepts([result()])
    assert mean.model_dump(exclude={"metrics"}) == result().model_dump(exclude={"metrics"})
    assert mean.metrics["acc_e"].ci95 == pytest.approx(result().metrics["acc_e"].ci95)


def test_a_mean_needs_all_values_and_like_runs():
    missing = result("dog", metrics={"acc_e": metric(None, ci95=None, n=0)})
    assert mean_over_concepts([result(), missing]).metrics["acc_e"].value is None
    faster = result().model_copy(update={"protocol": {"steps": 3, "hash": "x"}})
    for other in (result(seed=1), result(method="uce"), faster):
        with pytest.raises(UsageError, match="no common mean"):
            mean_over_concepts([result(), other])
    with pytest.raises(UsageError):
        mean_over_concepts([])


def test_numbers_of_different_protocols_never_share_a_column():
    results = [result("cat", value=0.1), result("dog", value=0.2), result("cat", value=0.3, protocol="00000000")]
    columns, rows = compare(results)
    at = {name: columns.index(name) for name in ("acc_e [abcdef01]", "acc_e [00000000]")}
    assert [[row[i] for i in at.values()] for row in rows] == [["0.100", ""], ["0.200", ""], ["", "0.300"]]
    for column in range(5, len(columns)):
        hashes = {r.protocol["hash"] for r, row in zip(results, rows, strict=True) if row[column]}
        assert len(hashes) == 1
    assert compare(results[:2]).columns[-1] == "acc_e"


def test_tables_show_the_base_and_the_interval():
    columns, rows = table(result())
    assert dict(zip(columns, rows[0], strict=True)) == {
        "metric": "acc_e",
        "value": "0.020",
        "base": "0.970",
        "95 % interval": "0.010 to 0.050",
        "n": "200",
        "better": "lower",
        "evaluator": "judge@1",
    }
    assert table(result(metrics={"acc_e": metric(None, base=None, ci95=None)})).rows[0][1:4] == ["-", "-", "-"]


def test_scores_keep_lists_and_gaps(tmp_path):
    rows = [{"prompt": "a", "seed": 3_000_000, "seen": ["cat"], "score": 0.5}, {"prompt": "b", "seed": 1, "seen": []}]
    write_scores(rows, tmp_path / "scores.parquet")
    assert read_scores(tmp_path / "scores.parquet") == [rows[0], rows[1] | {"score": None}]
    (tmp_path / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError):
        read_scores(tmp_path / "scores.parquet")


def test_the_mean_does_not_depend_on_the_order_of_runs():
    parts = [result("cat", value=0.0), result("dog", value=0.1), result("ship", value=0.2)]
    values = {round(mean_over_concepts(order).metrics["acc_e"].value, 12) for order in itertools.permutations(parts)}
    assert len(values) == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "-"), (0.0714, "0.071"), (-1e-9, "0.000"), (9.5, "9.500"), (84.1914, "84.2"), (-151.67, "-151.7")],
)
def test_numbers_have_the_digits_that_a_reader_needs(value, said):
    assert number(value) == said
