"""Tables on terminals of any width: no word is ever cut."""

from __future__ import annotations

import re
import sys

import pytest

from erasekit.cli.tables import show

COLUMNS = ["metric", "value", "base", "95 % interval", "n", "better", "evaluator"]
ROWS = [
    ["acc_e", "0.000", "1.000", "0.000 to 0.071", "50", "lower", "mini-classifier@1"],
    ["frechet[mini-classifier/renders]", "149.7", "151.7", "-", "100", "lower", "mini-frechet@1"],
]
WORDS = {word for row in [COLUMNS[:5], *(r[:5] for r in ROWS)] for cell in row for word in cell.split()}


@pytest.fixture
def shown(monkeypatch, capsys):
    def at(width: int) -> str:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(width))
        show(COLUMNS, ROWS, title="A run", spare=("evaluator", "better"))
        return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)

    return at


@pytest.mark.parametrize("width", [40, 72, 80, 120])
def test_no_word_is_cut(shown, width):
    text = shown(width)
    assert set(text.replace(":", " ").split()) >= WORDS
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_spare_columns_give_way_one_after_the_other(shown):
    assert [name in shown(120) for name in ("better", "evaluator")] == [True, True]
    assert [name in shown(80) for name in ("better", "evaluator")] == [True, False]
    assert [name in shown(72) for name in ("better", "evaluator")] == [False, False]
    assert len(shown(72).splitlines()) == 5


def test_a_file_gets_all(capsys):
    show(COLUMNS, ROWS, spare=("evaluator",))
    assert "mini-frechet@1" in capsys.readouterr().out


def test_a_table_without_rows_has_its_columns(shown, capsys):
    show(COLUMNS, [])
    assert "evaluator" in capsys.readouterr().out
