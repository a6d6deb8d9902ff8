"""Every method in bfloat16: its losses are those of float32 to the precision of the type, and what it saves is finite."""

from __future__ import annotations

import pytest
import torch

from erasekit.erasures.deltas import to_dense
from erasekit.registration import plugins
from erasekit.runs.compute import compute
from erasekit.runs.config import build
from erasekit.runs.resolve import resolve
from tests.conftest import THIRD_PARTY
from tests.test_rows import METHODS, SHORT

REGISTRIES = plugins.load([THIRD_PARTY / "tiny_world.py"])
# bfloat16 keeps 8 bits. A prediction of size 1 is off by up to 2^-7 after its layers have been rounded, and so is its target:
# a loss that is the square of their difference is off by 2^-13, and by 15 % of itself.
RELATIVE, FLOOR = 0.15, 2.0**-13


def mean_square(method, name, loss):
    """A loss as the mean square of a difference between predictions.

    GEM's is 100 times the distance of two tensors of 256, and what SPM holds counts a thousand times.
    """
    if (method, name) == ("spm", "anchor"):
        return loss / 1000
    return (loss / 100) ** 2 / 256 if method == "gem" else loss


@pytest.fixture(scope="module", params=["tiny", "tiny-flux"])
def folder(request, tiny_folder, tiny_flux_folder):
    return request.param, {"tiny": tiny_folder, "tiny-flux": tiny_flux_folder}[request.param]


def erased(folder, method, dtype):
    """The losses of every step, and the total change of each layer."""
    name, path = folder
    held = [f"backbone.path={path}", "backbone.device=cpu", f"backbone.dtype={dtype}"]
    settings = [*held, *SHORT.get(method, []), *(["method.eta=1.0"] if method == "trace" else [])]
    plan = resolve(
        build({"method": method, "backbone": name, "task": "words", "concepts": ("cat",)}, overrides=settings), REGISTRIES
    )
    logged = []
    backbone = plan.backbone.load(plan.backbone_config)
    erasure = compute(plan, backbone, REGISTRIES, log=lambda step, total, values: logged.append(dict(values)))
    assert backbone.unchanged()
    return logged, erasure


@pytest.mark.parametrize("method", METHODS)
def test_losses_in_bf16_are_those_in_fp32(folder, method):
    (coarse, half), (fine, whole) = (erased(folder, method, dtype) for dtype in ("bfloat16", "float32"))
    assert len(coarse) == len(fine)
    for mine, theirs in zip(coarse, fine, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            half_precision, full_precision = (mean_square(method, name, loss) for loss in (value, theirs[name]))
            assert half_precision == pytest.approx(full_precision, rel=RELATIVE, abs=FLOOR), name
    if half.guidance:
        return
    assert half.total().keys() == whole.total().keys()
    for name, delta in half.total().items():
        assert torch.isfinite(to_dense(delta)).all(), name
