"""What a plugin owes, as functions that a package calls in one line of its tests; and tiny models to try it on.

    from erasekit.testing import check_method

    def test_it_keeps_its_contract():
        check_method("my-method", settings={"steps": 2})

Each check raises an AssertionError of one line: what is broken, where, and what it should be.
"""

from erasekit.testing.attacks import check_attack
from erasekit.testing.backbones import check_backbone
from erasekit.testing.evaluators import check_evaluator
from erasekit.testing.methods import check_method
from erasekit.testing.tasks import check_task
from erasekit.testing.worlds import tiny_folder

__all__ = ["check_attack", "check_backbone", "check_evaluator", "check_method", "check_task", "tiny_folder"]
