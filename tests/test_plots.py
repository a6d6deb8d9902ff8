"""Charts and training curves: coordinates, ticks, shades, and which steps count."""

import pytest

from erasekit.runs.pages.plots import Axis, Chart, Mark, Series, around, level
from erasekit.runs.pages.training import curves, history, smoothed


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        (Axis("", 0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis("", 1, 60), ["20", "40", "60"]),
        (Axis("", 0, 4e-4), ["0", "1e-04", "2e-04", "3e-04", "4e-04"]),
        (Axis("", 0, 2.1e-4), ["0", "5e-05", "1e-04", "1.5e-04", "2e-04"]),
        (Axis("", -0.5, 0.5), ["-0.4", "-0.2", "0", "0.2", "0.4"]),
        (Axis("", 0.008, 2.0, log=True), ["0.01", "0.1", "1"]),
        (Axis("", 1e-9, 1.0, log=True), ["1e-09", "1e-07", "1e-05", "0.001", "0.1"]),
        (Axis("", 0, 2, names=[(0.5, "a"), (1.5, "b")]), ["a", "b"]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(axis, texts):
    assert [text for _, text in axis.ticks()] == texts
    assert all(0 <= at <= 1 for at, _ in axis.ticks())


def test_values_lie_where_they_should_and_never_outside():
    assert Axis("", 2, 4).at(2.5) == 0.25
    assert Axis("", 0.01, 1, log=True).at(0.1) == pytest.approx(0.5)
    assert [Axis("", 0, 1).at(v) for v in (-3, 7)] == [0, 1]
    assert Axis("", 0.01, 1, log=True).at(0) == 0
    chart = Chart("t", [], Axis("", 0, 1), Axis("", 0, 1), width=100, height=100, left=20, bottom=30)
    assert (chart.px(0), chart.px(1)) == ("20.0", "86.0")
    assert (chart.py(0), chart.py(1)) == ("70.0", "24.0")


def test_a_step_goes_down_and_then_on():
    series = Series("front", [Mark(0, 1), Mark(1, 0)], "step")
    chart = Chart("t", [series], Axis("", 0, 1), Axis("", 0, 1), width=100, height=100, left=20, bottom=30)
    assert chart.path(series) == "20.0,24.0 20.0,70.0 86.0,70.0 86.0,70.0"


def test_a_chart_is_told_in_words_and_escapes_names():
    series = [
        Series("<b>", [Mark(0, 0.5), Mark(2, 0.25)]),
        Series("", [Mark(0, 1)], "faint"),
        Series("few", [Mark(1, 1)], "dots"),
    ]
    drawing = Chart("Loss", series, Axis("step", 0, 2), Axis("", 0, 1)).draw()
    assert 'aria-label="Loss. &lt;b&gt;: 0.5 at step 0, 0.25 at 2. few: 1 points."' in drawing
    assert "<b>" not in drawing


def test_axes_and_shades_of_equal_values():
    assert around([3.0, 3.0]) == (1.5, 4.5)
    assert around([0.0]) == (-1.0, 1.0)
    assert [level(v, 0, 1) for v in (None, 0, 0.5, 1, 2)] == [None, 0, 5, 10, 10]
    assert level(1.0, 1.0, 1.0) == 0


def step(number, total=10, **values):
    return {"event": "StepEnd", "step": number, "total": total, "values": values or {"loss": float(number)}}


def test_curves_leave_out_what_cannot_be_drawn():
    assert curves([], {}) == []
    assert curves([{"loss": 0.0}, {"loss": 0.0}], {}) == []
    (curve,) = curves([{"off/cat": float(i)} for i in range(1000)], {"off": "how far off"})
    assert (curve.name, curve.meaning) == ("off/cat", "how far off")
    assert [len(s.marks) for s in curve.chart.series] == [250, 250]
    assert not curve.chart.y.log


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis():
    (curve,) = curves([{"loss": 0.8**i} for i in range(60)], {})
    assert curve.chart.y.log
    assert curve.chart.y.low > 0


def test_the_running_mean_starts_at_the_first_value_and_follows():
    assert smoothed([1.0, 0.0]) == [1.0, 0.85]
    assert smoothed([2.0] * 9) == pytest.approx([2.0] * 9)
    assert smoothed([]) == []


def test_steps_that_were_done_again_after_a_kill_count_once():
    started = {"event": "RunStarted"}
    log = [started, *(step(i) for i in range(1, 9)), started, *(step(i) for i in range(6, 11))]
    assert [values["loss"] for values in history(log)] == list(range(1, 11))


def test_trainings_one_after_the_other_are_one_line():
    two = [*(step(i, a=float(i)) for i in range(1, 11)), *(step(i, b=float(i)) for i in range(1, 11))]
    assert len(history(two)) == 20
    killed = [*two[:13], {"event": "RunStarted"}, *two[10:]]
    assert history(killed) == history(two)
    killed = [*two[:10], {"event": "RunStarted"}, *two[10:]]
    assert history(killed) == history(two)
