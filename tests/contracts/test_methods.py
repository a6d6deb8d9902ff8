"""Every method that comes with erasekit keeps the contract that `check_method` tells authors of others about."""

import pytest

from erasekit.registration.plugins import default
from erasekit.testing import check_method
from erasekit.testing.worlds import with_world
from tests.conftest import THIRD_PARTY

FILE = THIRD_PARTY / "single_file_method.py"
SHORT = {
    "advunlearn": {"steps": 2, "plain_steps": 1, "attack_steps": 2, "trajectories": 2},
    "trace": {"eta": 1.0, "steps": 2, "trajectories": 4, "clean_trajectories": 4, "batch": 2},
    "ant": {"steps": 2, "trajectories": 2, "batch": 2, "saliency_draws": 1, "fusion_points": 8},
    "eraseanything": {"steps": 2, "images": 2, "kept_images": 3},
    "eraseflow": {"steps": 2},
    "gem": {"steps": 2},
    "esd": {"steps": 2, "trajectories": 2, "batch": 2},
    "mace": {"steps": 2, "images": 2, "kept_images": 3},
    "pull": {"steps": 2},
    "spm": {"steps": 2, "warmup": 0},
    "stereo": {"steps": 2, "images": 2, "trajectories": 2, "word_steps": 2, "loops": 1},
}
METHODS = [*(entry.name for entry in default().methods.entries()), "pull", "direction"]


CLOSED = ("trace", "mace")  # those with training steps whose closed form edits by itself


def trains(method):
    return "steps" in with_world(FILE).methods.get(method).Config.model_fields


def depths(method):
    """Settings to try: the closed form, where there is one, and 20 steps, where there are any."""
    closed = [{"steps": 0}] if method in CLOSED else []
    return [*closed, {"steps": 20}] if trains(method) else [{}]


def pytest_generate_tests(metafunc):
    matrix = metafunc.config.getoption("--matrix")
    metafunc.parametrize(
        "backbone",
        ["tiny", "tiny-flux", *(("tiny-xl", "tiny-sd3", "tiny-flux2-base", "sd15-mini", "flux-mini") if matrix else ())],
    )
    if "depth" in metafunc.fixturenames:
        pairs = [(method, depth) for method in METHODS for depth in (depths(method) if matrix else [{}])]
        names = [f"{method}-{depth['steps'] or 'closed'}" if depth else method for method, depth in pairs]
        metafunc.parametrize(("method", "depth"), pairs, ids=names)


def test_a_method_keeps_its_contract(backbone, method, depth):
    settings = SHORT.get(method, {}) | depth
    check_method(method, settings=settings, backbones=[backbone], concepts=["cat"], plugin=FILE)


@pytest.mark.parametrize("method", ["direction"])
def test_several_concepts_are_erased_together(backbone, method):
    check_method(method, backbones=[backbone], plugin=FILE)
