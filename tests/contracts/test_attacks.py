"""Every attack that comes with erasekit keeps the contract that `check_attack` tells authors of others about."""

import pytest

from erasekit.registration.plugins import default
from erasekit.testing import check_attack
from tests.conftest import THIRD_PARTY

FILE = THIRD_PARTY / "single_file_attack.py"
SHORT = {
    "ring-a-bell": {"population": 6, "generations": 2, "tokens": 4, "queries": 2},
    "unlearndiff": {"steps": 2, "queries": 2, "points": 2},
    "p4d-n": {"steps": 2, "queries": 2, "tokens": 4},
    "p4d-k": {"steps": 2, "queries": 2, "restarts": 2},
    "concept-inversion": {"steps": 2, "queries": 2, "batch": 2},
    "relearn": {"at": (1, 2), "images": 2, "batch": 2},
    "noise": {"queries": 2},
    "classifier-guidance": {"queries": 2},
}
ATTACKS = [*(entry.name for entry in default().attacks.entries()), "backwards"]


@pytest.mark.parametrize("backbone", ["tiny", "tiny-flux"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_keeps_its_contract(backbone, attack):
    check_attack(attack, settings=SHORT.get(attack), backbones=[backbone], plugin=FILE)
