"""Every method that comes with erasekit keeps the contract that `check_method` tells authors of others about."""

import pytest

from erasekit.registration.plugins import default
from erasekit.testing import check_method
from tests.conftest import THIRD_PARTY

FILE = THIRD_PARTY / "single_file_method.py"
SHORT = {
    "advunlearn": {"steps": 2, "plain_steps": 1, "attack_steps": 2, "trajectories": 2},
    "trace": {"eta": 1.0, "steps": 2, "trajectories": 4, "clean_trajectories": 4, "batch": 2},
    "ant": {"steps": 2, "trajectories": 2, "batch": 2, "saliency_draws": 1, "fusion_points": 8},
    "eraseanything": {"steps": 2, "images": 2, "kept_images": 3},
    "esd": {"steps": 2, "trajectories": 2, "batch": 2},
    "mace": {"steps": 2, "images": 2, "kept_images": 3},
    "pull": {"steps": 2},
    "stereo": {"steps": 2, "images": 2, "trajectories": 2, "word_steps": 2, "loops": 1},
}
METHODS = [*(entry.name for entry in default().methods.entries()), "pull", "direction"]


def pytest_generate_tests(metafunc):
    minis = ["sd15-mini", "flux-mini"] if metafunc.config.getoption("--full") else []
    metafunc.parametrize("backbone", ["tiny", "tiny-flux", *minis])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_its_contract(backbone, method):
    check_method(method, settings=SHORT.get(method), backbones=[backbone], concepts=["cat"], plugin=FILE)


@pytest.mark.parametrize("method", ["direction"])
def test_several_concepts_are_erased_together(backbone, method):
    check_method(method, backbones=[backbone], plugin=FILE)
