"""How a command ends: an interrupt is one line with code 130, wherever it comes, and never a traceback."""

from __future__ import annotations

import errno
import sys

import pytest

from erasekit import __main__, cli
from erasekit.cli.ends import Interrupted, code_of, guarded
from erasekit.errors import EnvironmentProblem, ErasekitError, UsageError


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Interrupted."),
        (Interrupted("Interrupted. Kept."), 130, "Interrupted. Kept."),
        (UsageError("Wrong."), 2, "Wrong."),
        (EnvironmentProblem("No room."), 3, "No room."),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "No space left on device. Free some space."),
        (MemoryError(), 3, "There is not enough memory. Use a smaller batch, size or model."),
        (ErasekitError("It failed."), 4, "It failed."),
    ],
)
def test_each_end_has_its_code_and_one_line(error, code, said, capsys):
    assert code_of(error) == code
    assert capsys.readouterr().err == f"{said}\n"


def test_an_interrupted_command_says_what_was_kept():
    def command():
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"^Interrupted\. The images are kept\.$"):
        guarded(command, "The images are kept.")()


@pytest.mark.parametrize("given", [0, 1, None, "bye"])
def test_a_plugin_cannot_end_a_command_with_a_code_of_its_own(given):
    def command():
        sys.exit(given)

    with pytest.raises(ErasekitError, match=r"A plugin called sys\.exit") as error:
        guarded(command, "")()
    assert error.value.exit_code == 4


def test_an_interrupt_while_modules_are_imported(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", main)
    with pytest.raises(SystemExit) as ended:
        __main__.entry_point()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"
