"""`erasekit compare`: what shares a table, what is refused and why, and when a paper's row may stand beside a run."""

import csv
import io
import json
import re
import tomllib

import pytest

from erasekit.cli import main
from erasekit.errors import UsageError
from erasekit.evaluation.natural.nudity import EXPOSED
from erasekit.evaluation.results import Metric, Table, write_result
from erasekit.registration.plugins import default
from erasekit.sweeps.compared import PUBLISHED, compared_rows, published
from erasekit.sweeps.table import latex
from tests.test_report import SHARE, result

NUDENET = {"model": "NudeNet 3.4.2 320n", "threshold": 0.6, "classes": [*EXPOSED]}
I2P = {"sampler": "ddim", "steps": 50, "guidance": 7.5, "size": 512, "evaluators": {"nudenet": NUDENET}, "hash": "abcdef01"}


def run(folder, *, left=0.1, concept="cat", **changes):
    """A finished run's numbers."""
    folder.mkdir(parents=True)
    metrics = {"acc_e": SHARE.model_copy(update={"value": left, "ci95": (max(0.0, left - 0.1), left + 0.1)})}
    values = {"concepts": (concept,), "metrics": metrics, "erasure_sha256": folder.name} | changes
    write_result(result(**values), folder / "results.json")
    return folder


@pytest.fixture
def four(tmp_path):
    """Two methods, two concepts each."""
    shares = {"uce": (0.1, 0.3), "trace": (0.0, 0.1)}
    return [
        run(tmp_path / f"{method}-{concept}", left=left, concept=concept, method=method, protocol={"hash": concept})
        for method, of in shares.items()
        for concept, left in zip(("cat", "dog"), of, strict=True)
    ]


def nudity(folder, backbone="sd14", n=4703, **protocol):
    """A run of i2p."""
    count = Metric(value=100, base=700, n=n, higher_is_better=False, evaluator="nudenet@1")
    values = {"task": "i2p", "backbone": backbone, "metrics": {"unsafe_detections": count}, "protocol": I2P | protocol}
    return run(folder, **values)


def test_rows_are_means_over_concepts_with_paired_differences(four):
    rows = compared_rows(four)
    assert [rows[name]["metrics"]["acc_e"]["mean"] for name in ("uce", "trace")] == [0.2, 0.05]
    assert rows["trace"]["differences"]["acc_e"]["mean"] == -0.15
    assert rows["trace"]["differences"]["acc_e"]["concepts"] == 2
    assert "differences" not in rows["uce"]


def test_unlike_protocols_are_refused_with_what_differs(four, tmp_path):
    fast = run(tmp_path / "fast", method="esd", protocol={"hash": "0", "steps": 3, "evaluators": {"x": {"threshold": 0.5}}})
    slow = run(tmp_path / "slow", method="uce", protocol={"hash": "1", "steps": 30, "evaluators": {"x": {"threshold": 0.6}}})
    told = "steps is 3 in 'esd' and 30 in 'uce'; evaluators.x.threshold is 0.5 in 'esd' and 0.6 in 'uce'"
    with pytest.raises(UsageError, match=re.escape(told)):
        compared_rows([fast, slow])
    other = run(tmp_path / "other", method="esd", protocol={"hash": "other"})
    with pytest.raises(UsageError, match="'uce' and 'esd' drew other prompts or seeds"):
        compared_rows([four[0], other])
    with pytest.raises(UsageError, match="backbone is tiny and flux"):
        compared_rows([four[0], run(tmp_path / "flux", backbone="flux")])
    with pytest.raises(UsageError, match="'uce' has cat, dog and 'trace' has cat"):
        compared_rows(four[:3])
    with pytest.raises(UsageError, match="No such file"):
        compared_rows([tmp_path / "none"])


def test_published_rows_stand_only_beside_what_was_measured_alike(tmp_path):
    rows, _ = published(nudity(tmp_path / "alike"))
    assert rows["MACE [published: ANT, Table 1]"] == {"unsafe_detections": 111}
    assert all("[published: " in name for name in rows)
    for i, (changed, why) in enumerate(
        {
            "n is 142, there 4703": {"n": 142},
            "guidance is 7.0, there 7.5": {"guidance": 7.0},
            "own is guidance, there not set": {"own": ["guidance"]},
            "evaluators.nudenet.threshold is 0.5, there 0.6": {"evaluators": {"nudenet": NUDENET | {"threshold": 0.5}}},
            "evaluators.nudenet.classes is ANUS_EXPOSED": {"evaluators": {"nudenet": NUDENET | {"classes": ["ANUS_EXPOSED"]}}},
            "backbone is sd15, there sd14": {"backbone": "sd15"},
        }.items()
    ):
        rows, reasons = published(nudity(tmp_path / str(i), **why))
        assert rows == {}
        assert changed in reasons[0]
    assert published(run(tmp_path / "mini")) == ({}, [])


def test_every_published_table_says_what_it_was_measured_with():
    tables = tomllib.loads(PUBLISHED.read_text())["table"]
    assert {table["task"] for table in tables} == {"i2p", "celebrities"}
    for table in tables:
        assert {"source", "task", "metric", "n", "where", "rows"} == table.keys()
        assert {"backbone", "sampler", "steps", "guidance", "size"} < table["where"].keys()
        assert any(key.startswith("evaluators.") for key in table["where"])
        assert default().backbones.entry(table["where"]["backbone"])
    assert sum(len(table["rows"]) for table in tables) == 22 + 5 + 11


def test_the_command_prints_what_papers_and_spreadsheets_take(four, tmp_path, capsys):
    assert main(["compare", *map(str, four)]) == 0
    assert "0.050" in capsys.readouterr().out
    assert main(["compare", *map(str, four), "--csv"]) == 0
    first = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert first[0][:2] == ["row", "acc_e"]
    assert first[2][:2] == ["trace", first[2][1]]
    assert first[2][1].startswith("0.050 (")
    assert main(["compare", *map(str, four), "--markdown"]) == 0
    assert "| uce | 0.200 (" in capsys.readouterr().out
    assert main(["compare", *map(str, four), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["uce"]["metrics"]["acc_e"]["mean"] == 0.2
    assert main(["compare", *map(str, four), "--latex", "--csv"]) == 2
    capsys.readouterr()
    assert main(["compare", str(nudity(tmp_path / "i2p")), "--published", "--latex"]) == 0
    printed = capsys.readouterr()
    assert "MACE [published: ANT, Table 1] & 111.0 &" in printed.out
    assert "FLUX" not in printed.out
    assert "Not measured alike, so left out: EraseAnything, as cited in ANT: backbone is sd14, there flux" in printed.err


def test_latex_is_escaped():
    assert latex(Table(["a_b", "50 %"], [["x & y", "<= 0.2"]])) == "\n".join(
        [
            r"\begin{tabular}{lr}",
            r"\toprule",
            r"a\_b & 50 \% \\",
            r"\midrule",
            r"x \& y & \textless{}= 0.2 \\",
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )
