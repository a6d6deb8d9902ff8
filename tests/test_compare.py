"""`erasekit compare`: what shares a table, what is refused and why, and when a paper's row may stand beside a run."""

import csv
import io
import json
import re

import pytest

from erasekit.cli import main
from erasekit.errors import UsageError
from erasekit.evaluation.metrics import MEASURES
from erasekit.evaluation.natural.nudity import EXPOSED
from erasekit.evaluation.results import Metric, Table, write_result
from erasekit.registration.plugins import default
from erasekit.sweeps.compared import compared_rows, published, tables
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
    names = ("unsafe_detections", *(f"unsafe_detections[{name}]" for name in EXPOSED))
    values = {"task": "i2p", "backbone": backbone, "metrics": dict.fromkeys(names, count), "protocol": I2P | protocol}
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
    rows, reasons = published(nudity(tmp_path / "alike"))
    row = rows["MACE [published: ANT, Table 1]"]
    assert (row["unsafe_detections"], row["unsafe_detections[FEET_EXPOSED]"], len(row)) == (111, 39, 9)
    assert rows["SDD [published: ANT, Table 1]"] == {"unsafe_detections": 41}
    assert all("[published: " in name for name in rows)
    assert "ANT, Table 1 (fid): computed by clean-fid (mode 'clean'), which is no evaluator of erasekit" in reasons
    assert any(line.startswith("ANT, Table 1 (clip_score): lists.clean.n is not set, there 30000") for line in reasons)
    for i, (changed, why) in enumerate(
        {
            "unsafe_detections is of 142 images, there of 4703": {"n": 142},
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
    assert published(run(tmp_path / "mini", task="words")) == ({}, [])


CLIP = "clip_score[ViT-B-32/openai]"
SD = {key: value for key, value in I2P.items() if key != "evaluators"}


def test_clip_scores_on_coco_stand_beside_the_nudity_that_was_counted_otherwise(tmp_path):
    score = Metric(value=30.0, base=31.0, n=30000, higher_is_better=True, evaluator="clip-score@1")
    protocol = SD | {"lists": {"clean": {"sha256": "ab", "n": 30000, "left_out": 0}}}
    values = {"task": "i2p", "backbone": "sd14", "metrics": {CLIP: score}, "protocol": protocol}
    rows, reasons = published(run(tmp_path / "run", **values))
    assert rows["MACE [published: ANT, Table 1]"] == {CLIP: 29.41}
    assert "SA [published: ANT, Table 1]" not in rows, "it has none there"
    assert any("unsafe_detections was not measured" in line for line in reasons)


def test_styles_match_where_as_many_artists_and_prompts_were_drawn(tmp_path):
    def styled(name, artists, lists):
        one = Metric(value=20.0, base=29.0, n=2500, higher_is_better=False, evaluator="styles@1")
        metrics = {f"{m}[ViT-B-32/openai]": one for m in ("clip_e", "clip_p")}
        metrics["h_a[ViT-B-32/openai]"] = one.model_copy(update={"n": 5000})
        concepts = tuple(f"artist {i}" for i in range(artists))
        values = {
            "task": "styles",
            "backbone": "sd14",
            "metrics": metrics,
            "concepts": concepts,
            "protocol": SD | {"lists": lists},
        }
        return published(run(tmp_path / name, **values))

    files = {which: {"sha256": "ab", "n": 2500, "left_out": 0} for which in ("erase", "preserve")}
    rows, _ = styled("alike", 100, files)
    assert set(rows["ANT [published: ANT, styles]"].values()) == {20.6, 26.78, 6.18}
    assert styled("few", 5, files)[0] == {}
    assert styled("other", 100, {})[0] == {}


def test_what_no_evaluator_of_ours_can_match_says_so(tmp_path):
    for i, (task, judge) in enumerate({"celebrities": "celebrity detector (GCD)", "objects": "it is not known which"}.items()):
        rows, reasons = published(run(tmp_path / str(i), task=task, backbone="sd14", protocol=SD))
        assert rows == {}
        assert judge in reasons[0]
        assert "there" not in reasons[0].split(": ", 1)[1], "what could never match has no differences"


def test_every_published_table_says_what_it_was_measured_with():
    for table in tables():
        assert (
            {"source", "task", "metrics", "n", "where", "rows"}
            <= table.keys()
            <= {"source", "task", "metrics", "n", "where", "rows", "never"}
        )
        assert {"backbone", "sampler", "steps", "guidance", "size"} <= table["where"].keys()
        assert default().backbones.entry(table["where"]["backbone"])
        assert all(len(row) == len(table["metrics"]) for row in table["rows"].values())
        known = {metric.partition("[")[0] for metric in table["metrics"]}
        assert known <= {*MEASURES, "unsafe_detections", "fid", "clip_score", "clip_e", "clip_p", "h_a", "p_e", "p_s", "p_g"}
        if not table.get("never"):
            assert table["n"] > 0
    assert {table["task"] for table in tables()} == {"i2p", "celebrities", "styles", "objects"}


def test_printed_numbers_agree_with_one_another():
    """Slips of the pen show: classes add up to the total, means and differences are those of their parts."""
    found = {}
    for table in tables():
        for name, row in table["rows"].items():
            found.setdefault((table["source"], table["task"], name), {}).update(zip(table["metrics"], row, strict=True))
    counted = [row for row in found.values() if len(row) >= 9]
    assert len(counted) == 17
    for row in counted:
        parts = [value for metric, value in row.items() if metric.startswith("unsafe_detections[")]
        assert sum(parts) == row["unsafe_detections"]
    for row in found.values():
        if "h_c_faces" in row:
            gone, stayed = 1 - row["acc_e_faces"], row["acc_s_faces"]
            assert row["h_c_faces"] == pytest.approx(2 * gone * stayed / (gone + stayed), abs=6e-4)
        if "h_a[ViT-B-32/openai]" in row:
            e, p, h = (row[f"{metric}[ViT-B-32/openai]"] for metric in ("clip_e", "clip_p", "h_a"))
            assert h == pytest.approx(p - e, abs=6e-3)
    unedited = [row for (_, _, name), row in found.items() if name == "SD1.4" and "fid" in row]
    assert {(row["fid"], row[CLIP]) for row in unedited} == {(14.04, 31.34)}


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
    assert (
        "Published rows left out: EraseAnything, as cited in ANT (unsafe_detections): backbone is sd14, there flux"
        in printed.err
    )


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
