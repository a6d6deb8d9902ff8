"""Files and folders that are whole or not there, and what killed processes leave of them."""

import os
import subprocess
import sys

import pytest

from erasekit.atomic import _here, remove, replacing, replacing_folder, sweep, sweep_below


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{_here()}-{process.pid}"


def test_a_file_is_written_whole_or_stays(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as temporary:
        temporary.open("w").write(1)
    assert (tmp_path / "a").read_text() == "old"
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_folder_is_written_whole_or_stays(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "a") as temporary:
        (temporary / "half" / "way").write_text("")
    assert names(tmp_path / "a") == ["old"]
    with replacing_folder(tmp_path / "a") as temporary:
        (temporary / "new").write_text("")
    assert names(tmp_path / "a") == ["new"]
    assert names(tmp_path) == ["a"]


def test_what_had_the_name_comes_back_if_the_new_one_cannot_take_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    with pytest.raises(OSError, match="No such file"):
        remove(tmp_path / "a", then=tmp_path / "missing")
    assert names(tmp_path / "a") == ["old"]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_a_stale_name_of_the_same_process_is_no_error(tmp_path, kind):
    """A container's processes have the same few numbers again and again."""
    stale = tmp_path / f".a.{_here()}-{os.getpid()}.{kind}"
    stale.mkdir()
    (stale / "rest").write_text("")
    with replacing_folder(tmp_path / "a") as temporary:
        (temporary / "new").write_text("")
    assert names(tmp_path / "a") == ["new"]
    assert names(tmp_path) == ["a"]


def test_what_the_dead_left_is_swept_and_what_the_living_write_is_not(tmp_path, dead):
    alive, far = f"{_here()}-{os.getppid()}", f"{'0' * 8}-{dead.partition('-')[2]}"
    others = [".a.tmp", ".a.x.tmp", "a.1.tmp"]
    stay = [f".a.{alive}.tmp", f".a.{far}.tmp", f".b.{dead}.tmp", *others]
    for name in (f".a.{dead}.tmp", *stay):
        (tmp_path / name).write_text("")
    sweep(tmp_path, "a")
    assert names(tmp_path) == sorted(stay)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / f".c.{alive}.tmp").mkdir()
    sweep_below(tmp_path)
    assert names(tmp_path / "below") == []
    assert names(tmp_path) == [*others, "below"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path, dead):
    """Killed between the two renames: the old folder is all there, under another name."""
    aside = tmp_path / f".a.{dead}.old"
    aside.mkdir()
    (aside / "old").write_text("")
    sweep(tmp_path, "a")
    assert names(tmp_path / "a") == ["old"]


def test_removing_follows_no_link(tmp_path, dead):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    (tmp_path / f".a.{dead}.tmp").symlink_to(tmp_path / "mine")
    sweep(tmp_path, "a")
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == ["file"]
