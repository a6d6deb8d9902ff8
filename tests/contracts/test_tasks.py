"""Every task that comes with erasekit keeps the contract that `check_task` tells authors of others about."""

import pytest

from erasekit.registration.plugins import default
from erasekit.testing import check_task

DOWNLOADED = ("natural/i2p",)  # their prompts are a data set of the hub
TASKS = [*(entry.name for entry in default().tasks.entries() if entry.name not in DOWNLOADED), "mini/words"]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_keeps_its_contract(task):
    check_task(task, evaluators=task.startswith("mini/"))
