"""The page of several runs, as HTML: rows, the Pareto front, what is never mixed, images, and what is blurred."""

import json
import re
from pathlib import Path

import pytest

from erasekit.errors import UsageError
from erasekit.evaluation.results import read_result, write_result
from erasekit.runs.pages.comparison import compared, front, write_comparison
from tests.test_report import HOSTILE, SHARE, Blurred, Plain, Reader, result, write_run


def run(folder: Path, *, left: float, stayed: float, still: tuple[int, ...] = (), task=None, **changes) -> tuple[Path, Plain]:
    """A finished run with its two shares."""
    write_run(folder, still=still)
    metrics = {
        "acc_e": SHARE.model_copy(update={"value": left, "ci95": (max(0, left - 0.1), min(1, left + 0.1))}),
        "acc_s": SHARE.model_copy(update={"value": stayed, "ci95": (stayed - 0.1, 1.0), "higher_is_better": True}),
    }
    write_result(result(**{"metrics": metrics, "timings_s": {"erase": 9.5}} | changes), folder / "results.json")
    (folder / "erasure" / "all.safetensors").write_bytes(b"0" * 2500)
    return folder, task or Plain()


@pytest.fixture
def three(tmp_path):
    """Three methods: one is beaten by another in both, the third stayed better."""
    return [
        run(tmp_path / "a", left=0.1, stayed=0.8, still=(2,), method="first", erasure_sha256="a"),
        run(tmp_path / "b", left=0.2, stayed=0.7, still=(1, 2), method="second", erasure_sha256="b"),
        run(tmp_path / "c", left=0.5, stayed=0.9, method="third", erasure_sha256="c"),
    ]


def test_the_front_is_what_nothing_beats_in_both():
    assert front({"a": (0.9, 0.8), "b": (0.8, 0.7), "c": (0.5, 0.9)}) == ["a", "c"]
    assert front({"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (1.0, 0.9)}) == ["a", "b"]
    assert front({}) == []


def test_runs_stand_side_by_side_with_intervals_front_and_cost(three, tmp_path):
    page = write_comparison(compared(three), tmp_path / "page.html").read_text()
    assert "<h1>first, second, third on tiny</h1>" in page
    assert "beaten by no other in both at once: first, third." in page
    assert page.count("on the front</span>") == 2
    assert "0.100<small>0.000 to 0.200</small>" in page
    assert "unedited model" in page
    assert "9.5" in page
    assert "2.5" in page
    assert "second: 0.800 gone, 0.700 stayed" in page
    assert page.count('<th scope="row">second</th>') == 2  # of the costs, in one table, and of the provenance
    reader = Reader(page)
    assert all(link.startswith(("data:image/webp;base64,", "#")) for link in reader.links)
    assert page.count("<script") == 1


def test_what_predictions_leave_and_move_stands_beside_the_numbers_of_images(three, tmp_path):
    assert "drift" not in write_comparison(compared(three), tmp_path / "page.html").read_text()
    manifest = {"residual": {"cat": {"prompts": 0.123, "other_words": None}}, "drift": 0.456}
    (three[0][0] / "erasure" / "erasure.json").write_text(json.dumps(manifest))
    page = write_comparison(compared(three), tmp_path / "page.html").read_text()
    numbers = page.partition('class="rows"')[2].partition("</table>")[0]
    assert re.search(r"by predictions: the most that is left.*by predictions: how far what stays", numbers)
    assert re.findall(r'<td class="number">(0\.123|0\.456)</td>', numbers) == ["0.123", "0.456"]


def test_what_is_seen_in_other_words_is_not_gone(three, tmp_path):
    folder, _ = three[0]
    first = read_result(folder / "results.json")
    words = first.metrics["acc_s"].model_copy(update={"value": 0.6, "ci95": (0.5, 0.7), "higher_is_better": False})
    write_result(first.model_copy(update={"metrics": {**first.metrics, "acc_g": words}}), folder / "results.json")
    page = write_comparison(compared(three), tmp_path / "page.html").read_text()
    assert "first: 0.400 gone, 0.800 stayed" in page
    assert "no other run beats second or third." in page


def test_images_stand_prompt_by_prompt_and_where_runs_differ_first(three, tmp_path):
    page = write_comparison(compared(three), tmp_path / "page.html").read_text()
    rows = re.findall(r'<tr data-set="(\w+)" data-outcome="(\w+)" data-prompt="([^"]+)"', page)
    assert len(rows) == 20
    assert [kind for _, kind, _ in rows[:3]] == ["differs", "differs", "alike"]
    assert {prompt.rpartition(" ")[2] for _, kind, prompt in rows if kind == "differs"} == {"1", "2"}
    assert page.count("data:image/webp") == 20 + 3 * 19
    assert page.count('<span class="gone">unreadable</span>') == 3


def test_what_was_not_measured_alike_stands_apart(three, tmp_path):
    other = run(tmp_path / "d", left=0.0, stayed=1.0, method="fourth", protocol={"sampler": "ddim", "hash": "12121212"})
    page = write_comparison(compared([*three, other]), tmp_path / "page.html").read_text()
    assert "not all measured alike" in page
    first, second = page.split('<section id="part-2">')
    assert "fourth" not in first.split('<section id="part-1">')[1].split("<section")[0]
    assert "Protocol 12121212" in second
    assert page.count("<svg viewBox") == 1 + 1  # the chart of the first part, and the icon of the viewer


def test_attacks_at_other_budgets_stand_apart_and_runs_without_any_beside_them(tmp_path):
    budgets = {"a": {"attacks_hash": "1"}, "b": {"attacks_hash": "2"}, "c": {}}
    runs = [
        run(
            tmp_path / n,
            left=0.1,
            stayed=0.8,
            method=f"method-{n}",
            protocol={"hash": "p"} | ({"attacks_hash": h} if h else {}),
        )
        for n, h in budgets.items()
    ]
    page = write_comparison(compared(runs), tmp_path / "page.html").read_text()
    first, second = (part.split("<section")[0] for part in re.split(r'<section id="part-\d">', page)[1:])
    assert "method-a" in first
    assert "method-c" in first
    assert "method-b" not in first
    assert "method-b" in second


def test_seeds_of_a_method_are_one_row_and_images_are_of_the_lowest(tmp_path):
    runs = [
        run(
            tmp_path / str(seed),
            left=left,
            stayed=0.8,
            method="same",
            seed=seed,
            erasure_sha256=str(seed),
            config_hash=str(seed),
        )
        for seed, left in ((1, 0.3), (0, 0.1))
    ]
    runs.append(run(tmp_path / "other", left=0.5, stayed=0.9, method="other"))
    page = write_comparison(compared(runs), tmp_path / "page.html").read_text()
    assert "same, other on tiny" in page
    assert "0.200<small>" in page
    assert page.count("data:image/webp") == 20 + 2 * 19


def test_one_method_in_two_ways_has_a_row_for_each(tmp_path):
    runs = [run(tmp_path / str(i), left=0.1 * i, stayed=0.8, config_hash=f"hash{i}", erasure_sha256=str(i)) for i in range(2)]
    assert [run.row for run in compared(runs)] == ["trace hash0", "trace hash1"]


def test_seeds_that_were_measured_otherwise_are_never_averaged(tmp_path):
    runs = [
        run(tmp_path / str(i), left=0.1, stayed=0.8, seed=i, config_hash=f"hash{i}", protocol={"hash": f"{i}"})
        for i in range(2)
    ]
    assert [run.row for run in compared(runs)] == ["trace hash0", "trace hash1"]


def test_images_of_a_blurred_task_are_blurred_on_this_page_too(tmp_path):
    runs = [run(tmp_path / name, left=0.1, stayed=0.8, method=name, task=Blurred()) for name in "ab"]
    hidden = write_comparison(compared(runs), tmp_path / "page.html").read_text()
    plain = write_comparison(compared(runs), tmp_path / "page.html", reveal=True).read_text()
    assert "<strong>blurred</strong>" in hidden
    assert "<strong>blurred</strong>" not in plain
    assert not {link for link in Reader(plain).links if link.startswith("data:")} & set(Reader(hidden).links)
    assert all(re.fullmatch(rf"base: {re.escape(HOSTILE)} \d+", alt) for alt in Reader(hidden).alts)


def test_runs_that_nothing_judged_and_means_without_images_are_shown(tmp_path):
    runs = [run(tmp_path / name, left=0.1, stayed=0.8, method=name, metrics={}) for name in "ab"]
    page = write_comparison(compared(runs), tmp_path / "page.html").read_text()
    assert "Nothing judged the images" in page
    assert "What is gone against" not in page
    for folder, _ in runs:
        (folder / "scores.parquet").unlink()
    assert "data:image" not in write_comparison(compared(runs), tmp_path / "page.html").read_text()


def test_the_command_writes_the_page_and_prints_the_table(erasekit, tmp_path):
    folders = [run(tmp_path / name, left=0.1, stayed=0.8, method=name)[0] for name in "ab"]
    for folder in folders:
        changed = read_result(folder / "results.json").model_copy(update={"task": "objects"})
        write_result(changed, folder / "results.json")
    done = erasekit("report", *folders, "--page", "--out", "mine.html", "--json")
    assert done.returncode == 0, done.stderr
    assert [r["method"] for r in json.loads(done.stdout)] == ["a", "b"]
    assert "Page: mine.html" in done.stderr
    assert "a, b on tiny" in (tmp_path / "mine.html").read_text()
    assert not (folders[0] / "report.html").exists()
    alone = erasekit("report", folders[0], "--page")
    assert alone.returncode == 2
    assert alone.stderr == "--page compares runs: give two or more. A run has a page of its own, report.html.\n"


def test_a_folder_without_results_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="Cannot read results"):
        compared([(tmp_path, Plain())])
