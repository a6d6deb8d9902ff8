"""Every evaluator whose weights are here keeps the contract that `check_evaluator` tells authors of others about."""

import pytest

from erasekit.testing import check_evaluator

EVALUATORS = {"red": "cat", "mini-classifier": "cat", "mini-clip": "cat", "mini-frechet": "cat", "mini-control": "mushroom"}


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_an_evaluator_keeps_its_contract(evaluator):
    check_evaluator(evaluator, label=EVALUATORS[evaluator])
