"""The device that these tests run on: a GPU, unless another is asked for."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="cpu shows that the tests themselves are right")


@pytest.fixture(scope="session")
def device(request) -> str:
    """The name of the device; a test fails where there is none."""
    name = request.config.getoption("--device")
    assert name != "cuda" or torch.cuda.is_available(), "There is no GPU; --device cpu runs these tests without one."
    return name
