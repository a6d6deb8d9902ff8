"""strength.json and interference.json: read as they were written, and refused if they are something else."""

import pytest

from erasekit.errors import UsageError
from erasekit.evaluation.curves import Curve, Interference, Point, Strength

CURVE = Curve(
    metric="acc_e",
    higher_is_better=False,
    points=(Point(strength=0, value=0.9, ci95=(0.8, 1.0), n=20), Point(strength=1, value=0.1, n=20)),
)


def test_both_files_are_read_as_they_were_written(tmp_path):
    strength = Strength(concepts=("cat",), curves=(CURVE,))
    matrix = Interference(erased=("cat",), asked=("cat", "dog"), values=((0.0, None),), base=(1.0, 0.9))
    for content in (strength, matrix):
        content.write(tmp_path / "file.json")
        assert type(content).read(tmp_path / "file.json") == content
    assert Strength.read(tmp_path / "none.json") is None


@pytest.mark.parametrize("text", ["{", "{}", '{"erased": ["a"], "asked": ["a", "b"], "values": [[0.5]]}', "\udcff"])
def test_what_is_no_such_file_is_one_line(tmp_path, text):
    path = tmp_path / "interference.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"is not a interference.json of this version") as error:
        Interference.read(path)
    assert "\n" not in str(error.value)


def test_a_curve_rises_in_strength():
    with pytest.raises(ValueError, match="rising order"):
        Curve(metric="acc_e", higher_is_better=False, points=CURVE.points[::-1])
